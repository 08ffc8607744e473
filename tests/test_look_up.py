"""N-gram drafts."""

from __future__ import annotations

import pytest

from pipeline.twig.decoding.look_up import following_of_last_match


@pytest.mark.parametrize(
    ("text", "length", "most", "expected"),
    [
        ([1, 2, 3, 1, 2], 2, 5, [3, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 4, 1, 2], 2, 1, [4]),  # of the last occurrence
        ([1, 2, 3], 2, 5, []),
        ([1], 1, 5, []),
        ([], 1, 5, []),
        ([7, 7], 1, 3, [7]),
        ([5, -1, 6, 5], 1, 3, []),  # a vision token follows
        ([5, 6, -1, 5], 1, 3, [6]),
        ([1, 2, 1], 0, 3, []),
    ],
)
def test_what_followed_the_last_match(text, length, most, expected):
    assert following_of_last_match(text, length, most) == expected
