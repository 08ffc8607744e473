"""A figure measured in inches from its top left corner, on which any text can be written."""

from __future__ import annotations

from functools import cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

FONT = "DejaVu Sans"  # comes with matplotlib
FONT_SIZE = 8.5


class Sheet:
    """A white figure; every place and size is in inches, left and top first."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text whose upper left corner is here, unless `ha` and `va` say otherwise."""
        style = {"fontsize": FONT_SIZE, "va": "top", "family": FONT} | style
        # A dollar sign is a dollar sign, not the beginning of a formula.
        self.figure.text(left / self.width, 1 - top / self.height, drawable(text), parse_math=False, **style)

    def colour_bar(
        self, left: float, top: float, width: float, *, colours: Colormap, scale: Normalize, name: str
    ) -> None:
        """A scale of percents, below its name, above its numbers."""
        self.write(left, top, name, va="bottom", fontsize=7)
        top += 0.03
        axes = self.axes(left, top, width, 0.1)
        bar = self.figure.colorbar(ScalarMappable(scale, colours), cax=axes, orientation="horizontal")
        bar.locator = MaxNLocator(nbins=4)
        bar.formatter = FuncFormatter(lambda share, _: f"{100 * share:.3g}%")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        axes.tick_params(labelsize=7, length=2, width=0.5, pad=1.5, labelfontfamily=FONT)


def drawable(text: str) -> str:
    """The text with an escape such as \\u4fa1 for every character that the font has no picture of."""
    known = _characters()
    return "".join(c if ord(c) in known or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())
