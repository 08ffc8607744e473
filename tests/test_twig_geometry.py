"""Where a twig grows, and the budget of vision tokens."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.twig.geometry import Geometry

LLAVA = Geometry(2, 3, 24, 32)
SMALL = Geometry(2, 3, 18, 24)  # MobileVLM V2 1.7B


@pytest.mark.parametrize(
    ("geometry", "num_tokens", "average", "expected"),
    [
        (LLAVA, 576, 192, 227),
        (LLAVA, 576, 128, 134),
        (LLAVA, 576, 64, 41),  # the released code's three budgets
        (SMALL, 144, 48, 54),
        (SMALL, 144, 32, 30),
        (SMALL, 144, 16, 6),
        (LLAVA, 144, 48, 57),
        (LLAVA, 144, 32, 34),
        (LLAVA, 144, 16, 11),  # 10.2: rounded up
        (Geometry(2, 3, 32, 32), 576, 64, 30),  # 29.9: no layer is wiped
        (LLAVA, 144, 108, 144),  # all, until they are wiped
        (Geometry(0, 1, 4, 4), 9, 3, 3),
    ],
)
def test_the_budget_is_the_papers(geometry, num_tokens, average, expected):
    assert geometry.num_kept(num_tokens, average / num_tokens) == expected


def test_the_average_over_the_layers_is_what_was_asked_for():
    """Within one token, since R is whole and rounded up."""
    for geometry in (LLAVA, SMALL):
        for average in (16, 32, 48, 100):
            kept = geometry.num_kept(144, average / 144)
            spent = geometry.attach_layer * 144 + (geometry.wipe_layer - geometry.attach_layer) * kept
            assert average <= spent / geometry.num_base_layers < average + 1


@pytest.mark.parametrize("share", [0.05, 1 / 16, 0.76, 1.0, 0.0, -1.0])
def test_a_share_that_cannot_be_kept_is_refused(share):
    with pytest.raises(ConfigError, match="choose a share between"):
        LLAVA.num_kept(144, share)


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ((2, 3, 24, 4), r"the base has 4 layers; choose K from 0 on and T from 1 on, with K \+ T at most 4"),
        ((-1, 3, 24, 32), "choose K from 0 on"),
        ((2, 0, 24, 32), "T from 1 on"),
        ((2, 3, 2, 32), "choose it from 3 to 32"),
        ((2, 3, 33, 32), "choose it from 3 to 32"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Geometry(*numbers)


def test_a_twig_may_end_at_the_last_layer():
    assert Geometry(2, 2, 4, 4).num_layers == 2
