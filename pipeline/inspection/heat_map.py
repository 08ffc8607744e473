"""One panel of a picture: an image, with the share of each vision token over it and the chosen ones outlined."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize
from PIL import Image, ImageOps

DARKEST_GREY = 0.72  # of the image below a heat map: enough to see shapes, too little to be taken for a share


@dataclass(frozen=True)
class Square:
    """A place on a sheet, in inches from its upper left corner."""

    left: float
    top: float
    side: float


def draw_image(axes: Axes, image: Image.Image, place: Square) -> None:
    """The image as it is, filling the place."""
    right, bottom = place.left + place.side, place.top + place.side
    axes.imshow(np.asarray(image), extent=(place.left, right, bottom, place.top), aspect="auto")


def draw_heat(
    axes: Axes, image: Image.Image, heat: np.ndarray, place: Square, *, colours: Colormap, scale: Normalize
) -> None:
    """A heat map, float 'Y X', a cell for each vision token, printed over the image in light grey.

    Where the image is brightest a colour is that of the scale, elsewhere a little darker.
    """
    bright = (
        np.asarray(ImageOps.autocontrast(image.convert("L")))[:, :, None] / 255
    )  # yellow on white is seen, too
    grey = DARKEST_GREY + (1 - DARKEST_GREY) * bright
    cells = Image.fromarray(np.uint8(255 * colours(scale(heat))[:, :, :3]))
    spread = np.asarray(cells.resize(image.size, Image.Resampling.NEAREST))
    draw_image(axes, Image.fromarray(np.uint8(spread * grey)), place)


def outline(axes: Axes, cells: Collection[int], place: Square, *, grid: int) -> None:
    """A line around cells, numbered row after row; neighbours share one."""
    corner = np.array([place.left, place.top])
    edges = corner + place.side / grid * np.array(border(cells, grid=grid)).reshape(-1, 2, 2)
    for colour, width in (("white", 3.0), ("black", 1.2)):
        lines = LineCollection(list(edges), colors=colour, linewidths=width, capstyle="projecting")
        axes.add_collection(lines, autolim=False)


def border(cells: Collection[int], *, grid: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges ((x, y), (x, y)) between the chosen cells and all others, the outside included."""
    chosen = {(cell % grid, cell // grid) for cell in cells}
    edges = []
    for x, y in sorted(chosen):
        for step, edge in (
            ((-1, 0), ((x, y), (x, y + 1))),
            ((1, 0), ((x + 1, y), (x + 1, y + 1))),
            ((0, -1), ((x, y), (x + 1, y))),
            ((0, 1), ((x, y + 1), (x + 1, y + 1))),
        ):
            if (x + step[0], y + step[1]) not in chosen:
                edges.append(edge)
    return edges
