"""One panel of a picture: an image with a heat map over it, and an outline around the chosen vision tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize
from PIL import Image, ImageOps

DARKEST_GREY = 0.72  # of the image below a heat map: shapes are visible, but not mistaken for a share


@dataclass(frozen=True)
class Square:
    """A square on a sheet, in inches from the sheet's upper left corner."""

    left: float
    top: float
    side: float


def draw_image(axes: Axes, image: Image.Image, place: Square) -> None:
    """Draw the image unchanged, filling the place."""
    right, bottom = place.left + place.side, place.top + place.side
    axes.imshow(np.asarray(image), extent=(place.left, right, bottom, place.top), aspect="auto")


def draw_heat(
    axes: Axes, image: Image.Image, heat: np.ndarray, place: Square, *, colours: Colormap, scale: Normalize
) -> None:
    """Draw a heat map, float 'Y X', a cell for each vision token, over the image in light grey.

    The colour is that of the scale where the image is brightest, elsewhere a little darker.
    """
    # With the full contrast of the image, so that yellow on white is visible.
    bright = np.asarray(ImageOps.autocontrast(image.convert("L")))[:, :, None] / 255
    grey = DARKEST_GREY + (1 - DARKEST_GREY) * bright
    cells = Image.fromarray(np.uint8(255 * colours(scale(heat))[:, :, :3]))
    spread = np.asarray(cells.resize(image.size, Image.Resampling.NEAREST))
    draw_image(axes, Image.fromarray(np.uint8(spread * grey)), place)


def outline(axes: Axes, cells: Collection[int], place: Square, *, grid: tuple[int, int]) -> None:
    """Draw one line around the cells, which are numbered row by row."""
    is_chosen = np.zeros(grid, dtype=bool)
    is_chosen.flat[list(cells)] = True
    padded = np.pad(is_chosen, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    # Edges (x, y) to (x, y) between the chosen cells and all others, the outside included.
    border = [((x, y), (x, y + 1)) for y, x in upright] + [((x, y), (x + 1, y)) for y, x in level]
    edges = (place.left, place.top) + place.side / np.array(grid[::-1]) * np.reshape(border, (-1, 2, 2))
    for colour, width in (("white", 3.0), ("black", 1.2)):
        lines = LineCollection(list(edges), colors=colour, linewidths=width, capstyle="projecting")
        axes.add_collection(lines, autolim=False)
