"""A figure measured in inches from its upper left corner, and text that fits on it."""

from __future__ import annotations

import textwrap
from functools import cache
from typing import Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator

FONT = "DejaVu Sans"  # installed with matplotlib
FONT_SIZE, SMALL_SIZE = 8.5, 7
BAR_GAP, BAR_HEIGHT = 0.03, 0.1
NARROWEST = 0.28  # width of a letter such as i, in units of the font's size
FEWEST = 4  # characters in a line, however narrow the line is


class Sheet:
    """A white figure covered by `axes`, in inches from its upper left corner."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")
        # One pair of axes serves all panels: a pair for each would take longer to draw than its content.
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.set_axis_off()

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write text with its upper left corner here, unless `ha` and `va` say otherwise."""
        style = {"fontsize": FONT_SIZE, "va": "top", "family": FONT} | style
        # A dollar sign does not start a formula.
        self.axes.text(left, top, drawable(text), parse_math=False, **style)

    def colour_bar(
        self, left: float, top: float, width: float, *, colours: Colormap, scale: Normalize, name: str
    ) -> None:
        """Draw a scale of percents between its name and its numbers."""
        self.write(left, top, name, va="bottom", fontsize=SMALL_SIZE)
        bottom = 1 - (top + BAR_GAP + BAR_HEIGHT) / self.height
        place = (left / self.width, bottom, width / self.width, BAR_HEIGHT / self.height)
        axes = self.figure.add_axes(place)
        bar = self.figure.colorbar(ScalarMappable(scale, colours), cax=axes, orientation="horizontal")
        bar.locator = MaxNLocator(nbins=4)
        bar.formatter = FuncFormatter(lambda share, _: f"{100 * share:.3g}%".replace("-", "−"))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        axes.tick_params(labelsize=SMALL_SIZE, length=2, width=0.5, pad=1.5, labelfontfamily=FONT)


def wrap(text: str, width: float, *, size: float = FONT_SIZE, max_lines: int | None = None) -> list[str]:
    """Return the text in lines of at most `width` inches; an ellipsis ends text that exceeds `max_lines`."""
    text = drawable(" ".join(text.split()))
    characters = int(width * 72 / size / NARROWEST)
    while True:
        lines = textwrap.wrap(text, characters, max_lines=max_lines, placeholder=" …")
        if characters <= FEWEST or all(text_width(line, size=size) <= width for line in lines):
            return lines
        characters = max(FEWEST, characters * 19 // 20)


def text_width(text: str, *, size: float = FONT_SIZE) -> float:
    """Return the width of a line in the regular weight, in inches."""
    font = get_font(findfont(FONT))
    font.set_size(1000, 72)  # large, so that hinting rounds little
    font.set_text(text)
    return font.get_width_height()[0] / 64 / 1000 * size / 72


def drawable(text: str) -> str:
    """Return the text with an escape such as \\u4fa1 for every character that the font lacks."""
    known = _characters()
    return "".join(c if ord(c) in known or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())
