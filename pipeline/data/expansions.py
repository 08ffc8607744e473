"""What a processor writes for an image, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.data.decoding import ImageSize
from pipeline.errors import BadSample, is_ours, reason_of
from pipeline.models.processors import Tensors

# Image processors find the axis of the colours by its size, 1 or 3, and would take a side of so many pixels for it.
SMALLEST_SIDE = 4


@dataclass(frozen=True)
class Expansion:
    """What a processor writes for an image: the text, its number N of vision tokens, their rows and columns."""

    text: str
    size: int
    grid: tuple[int, int]


def grid_of(number: int, pixels: Tensors) -> tuple[int, int]:
    """Return the rows and columns of an image's vision tokens; (0, 0) of several tiles or of no rectangle."""
    if "image_grid_thw" in pixels:
        _, rows, columns = pixels["image_grid_thw"][0].tolist()
        merged = round((rows * columns / number) ** 0.5)  # patches along a side that become one token
        return rows // merged, columns // merged
    values = pixels.get("pixel_values")
    if values is None:  # Video-LLaVA's have another name
        return 0, 0
    num_tiles = values.shape[:-3].numel()  # all axes before colour, height and width
    side = round(number**0.5)
    return (side, side) if num_tiles == 1 and side * side == number else (0, 0)


def spans_in(text: str, expansions: Sequence[Expansion]) -> list[range]:
    """Return where the tokens of each image may end in a text, the images in order."""
    spans, position = [], 0
    for expansion in expansions:
        start = text.index(expansion.text, position)
        position = start + len(expansion.text)
        spans.append(range(start + 1, position + 1))
    return spans


@contextmanager
def refusing(size: ImageSize) -> Iterator[None]:
    """Turn what a processor raises over an image of this size into a `BadSample`."""
    shown = f"{size[0]} x {size[1]} pixels"
    if min(size) < SMALLEST_SIDE:
        raise BadSample("image too narrow", f"{shown}; a side of {SMALLEST_SIDE} is the least")
    try:
        yield
    except ValueError as error:
        if is_ours(error):
            raise
        raise BadSample("the image processor refuses the image", f"{shown}: {reason_of(error)}") from error
