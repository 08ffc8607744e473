"""The shape check at the borders, and the legend it speaks."""

from __future__ import annotations

import re
import string

import pytest
import torch

from pipeline import shapes
from pipeline.shapes import ShapeError, expect_shape


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [("B S", None), ("2 S", None), ("B 3", {"B": 2}), ("B S", {"S": 3, "N": 144})],
)
def test_a_tensor_with_the_promised_axes_passes(axes, sizes):
    expect_shape("labels", torch.zeros(2, 3), axes, sizes)


def test_no_axes_are_those_of_a_scalar():
    expect_shape("total", torch.zeros(()), "")
    with pytest.raises(ShapeError):
        expect_shape("total", torch.zeros(1), "")


def test_another_shape_is_named_with_what_was_expected():
    with pytest.raises(ShapeError, match=re.escape("labels: expected axes 'B S', found shape (2, 3, 4)")):
        expect_shape("labels", torch.zeros(2, 3, 4), "B S")
    with pytest.raises(
        ShapeError, match=re.escape("pixels: expected axes 'I 3 Y X', found shape (1, 4, 8, 8)")
    ):
        expect_shape("pixels", torch.zeros(1, 4, 8, 8), "I 3 Y X")


def test_a_fixed_size_is_held_and_shown():
    message = re.escape("attention: expected axes 'B H T J' with T=5, J=4, found shape (2, 4, 5, 3)")
    with pytest.raises(ShapeError, match=message):
        expect_shape("attention", torch.zeros(2, 4, 5, 3), "B H T J", {"T": 5, "J": 4})


def test_a_letter_twice_is_one_size():
    expect_shape("attention", torch.zeros(2, 4, 6, 6), "B H S S")
    with pytest.raises(ShapeError):
        expect_shape("attention", torch.zeros(2, 4, 6, 5), "B H S S")


def test_every_axis_letter_has_one_meaning():
    letters = re.findall(r"^    ([A-Z])  ", shapes.__doc__ or "", flags=re.MULTILINE)
    assert letters == sorted(set(letters)) and set(letters) <= set(string.ascii_uppercase)
    assert {"B", "S", "I", "N", "T", "H", "V"} <= set(letters)
