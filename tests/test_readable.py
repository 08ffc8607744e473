"""Sizes and durations as a reader meets them."""

from __future__ import annotations

import pytest

from pipeline.readable import readable_bytes, readable_seconds


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 seconds"),
        (0.0123, "0.0123 seconds"),
        (1, "1 second"),
        (119.4, "119 seconds"),
        (120, "2 minutes"),
        (754, "12.6 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (3600 * 1234.5, "1,230 hours"),
    ],
)
def test_a_duration_is_told_in_the_unit_that_fits_it(seconds: float, shown: str):
    assert readable_seconds(seconds) == shown


def test_an_estimate_has_two_digits():
    assert [readable_seconds(s, digits=2) for s in (47.4, 118, 754, 86400 * 5)] == [
        "47 seconds",
        "120 seconds",
        "13 minutes",
        "120 hours",
    ]


def test_a_size_has_three_digits():
    assert [readable_bytes(n) for n in (0, 999, 1234, 5.678e9, 2e15)] == [
        "0 B", "999 B", "1.23 kB", "5.68 GB", "2e+03 TB",
    ]  # fmt: skip
