"""The legend of axis letters, and the check of a tensor's axes.

    A  batch of answer positions (all samples of a batch together)
    B  samples of a batch
    C  colour channels
    D  width of the language model (hidden size)
    G  vision tokens of a batch, all its images together, in order
    H  attention heads
    I  images of a batch, in order
    J  vision tokens of a whole sample
    K  top-k entries of a distribution
    L  layers
    M  patches of an image, as the vision tower makes them
    N  vision tokens of an image (144 in MobileVLM V2); in many families it differs from image to image
    P  answer positions of a sample
    R  rows of a ragged array, all samples of a part together
    S  positions of a sequence
    T  text-query rows: unpadded text positions after the first vision token
    V  vocabulary
    W  width of the vision tower
    X  pixels across
    Y  pixels down
    Z  draws from what a top-k leaves out

One letter has one meaning; two letters with equal sizes need not be the same axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class ShapeError(ValueError):
    """A tensor does not have the expected axes."""


def expect_shape(name: str, tensor: torch.Tensor, axes: str, sizes: Mapping[str, int] | None = None) -> None:
    """Raise `ShapeError` unless a tensor has these axes.

    `axes` are letters of the legend or sizes ("B S", "I 3 Y X"); `sizes` fixes the sizes of some letters. A letter
    that occurs twice must have the same size twice.
    """
    expected = axes.split()
    known = dict(sizes or {})
    agrees = tensor.ndim == len(expected)
    if agrees:
        for axis, size in zip(expected, tensor.shape, strict=True):
            agrees &= size == (int(axis) if axis.isdigit() else known.setdefault(axis, size))
    if not agrees:
        fixed = ", ".join(f"{axis}={size}" for axis, size in (sizes or {}).items())
        raise ShapeError(
            f"{name}: expected axes '{axes}'{f' with {fixed}' if fixed else ''}, "
            f"found shape {tuple(tensor.shape)}"
        )
