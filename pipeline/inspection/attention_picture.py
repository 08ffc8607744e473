"""The picture of a sample's attention: a heat map over the image for each text token, of teacher and students."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.errors import PipelineError, writing
from pipeline.inspection.attention_cells import Cell, Drawing, plan_drawing
from pipeline.inspection.heat_map import Square, draw_heat, draw_image, outline
from pipeline.inspection.sample import Inspection
from pipeline.inspection.sheet import Sheet, wrap

FORMATS = (".png", ".svg")
DOTS_PER_INCH = 150
# White is no attention and no difference. Colour-blind people can read both scales.
SHARES, DIFFERENCES = colormaps["magma_r"], colormaps["RdBu_r"]
# In inches. A panel is one heat map; a cell is a token's name above its panels.
MARGIN, GAP, CELL_GAP, NAME, LINE, BAR = 0.3, 0.07, 0.24, 0.2, 0.175, 0.5
PANEL, SMALL_PANEL, IMAGE_PANEL = 1.25, 1.1, 1.75
LEAST_WIDTH, MOST_HEIGHT_PER_WIDTH, MOST_GROWTH = 8.7, 1.2, 0.4
GREY, KEY_SIZE = "#555555", 10
SMALLEST_SCALE = 1e-4  # smaller shares and differences are rounding errors, and stay white
MOST_LINES_OF_TURN, MOST_CHARACTERS_OF_NAME = 4, 10


def draw_attention(
    inspection: Inspection,
    output: Path,
    *,
    students: Mapping[str, Tensor] | None = None,
    student_layer: int | None = None,
    max_tokens: int = 40,
) -> None:
    """Write a PNG or an SVG, by the file's ending.

    Each image gets a heat map for each of the first `max_tokens` text tokens after it: the teacher's attention in the
    shown layer, mean over heads, without interpolation between vision tokens. `students`, name -> float32 'T J' of
    `student_layer`, are drawn beside it, with the last one minus the teacher. Raises `PipelineError` if there is no
    image or no stored attention, and for another ending.
    """
    _check(inspection, output, max_tokens)
    drawing = plan_drawing(inspection, students or {}, max_tokens=max_tokens, student_layer=student_layer)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Without a date, and with a fixed salt of names in an SVG: the same sample gives the same bytes.
    with writing(output), matplotlib.rc_context({"svg.hashsalt": "alignkd"}):
        metadata = {"Date": None} if output.suffix.lower() == ".svg" else None
        AttentionFigure(inspection, drawing).draw().savefig(output, dpi=DOTS_PER_INCH, metadata=metadata)


class AttentionFigure:
    """A block for each image: the image beside the legend, and the cells below."""

    def __init__(self, inspection: Inspection, drawing: Drawing):
        self.inspection, self.drawing = inspection, drawing
        num_panels = len(drawing.headings)
        self.panel, self.per_row = arrange(max(map(len, drawing.images)), num_panels)
        self.cell_width = num_panels * (self.panel + GAP) - GAP + CELL_GAP
        self.row_height = NAME + self.panel + CELL_GAP / 2
        self.width = max(LEAST_WIDTH, self.per_row * self.cell_width - CELL_GAP)
        self.share = Normalize(0, max(drawing.largest_share, SMALLEST_SCALE))
        largest = max(drawing.largest_difference, SMALLEST_SCALE)
        self.difference = Normalize(-largest, largest)
        self.words = self._wrap_words()

    def draw(self) -> Figure:
        heads = [self._head_height(image) for image in range(len(self.drawing.images))]
        grids = [ceil(len(cells) / self.per_row) * self.row_height for cells in self.drawing.images]
        self.sheet = Sheet(self.width + 2 * MARGIN, sum(heads) + sum(grids) + (1 + len(heads)) * MARGIN)
        top = MARGIN
        for image, (head, grid) in enumerate(zip(heads, grids, strict=True)):
            self._draw_head(image, top)
            self._draw_cells(image, top + head)
            top += head + grid + MARGIN
        return self.sheet.figure

    def _head_height(self, image: int) -> float:
        title = NAME if len(self.inspection.images) > 1 else 0.0
        beside = len(self.words) * LINE + BAR if image == 0 else 0.0
        return title + max(IMAGE_PANEL, beside) + CELL_GAP + NAME * self.drawing.has_students

    def _draw_head(self, image: int, top: float) -> None:
        num_images = len(self.inspection.images)
        if num_images > 1:
            self.sheet.write(MARGIN, top, f"image {image + 1} of {num_images}", weight="bold")
            top += NAME
        place = Square(MARGIN, top, IMAGE_PANEL)
        draw_image(self.sheet.axes, self.inspection.images[image], place)
        self._outline(image, place)
        if image == 0:
            self._write_words(MARGIN + IMAGE_PANEL + CELL_GAP, top)

    def _write_words(self, left: float, top: float) -> None:
        for line, style in self.words:
            self.sheet.write(left, top, line, **style)
            top += LINE
        width = 0.4 * (self.width - IMAGE_PANEL)
        top += BAR / 4
        bars = [("share of a token's attention", SHARES, self.share)]
        if self.drawing.has_students:
            bars.append((self.drawing.headings[-1], DIFFERENCES, self.difference))
        for name, colours, scale in bars:
            self.sheet.colour_bar(left, top, width, colours=colours, scale=scale, name=name)
            left += width + 2 * CELL_GAP

    def _draw_cells(self, image: int, top: float) -> None:
        for number, cell in enumerate(self.drawing.images[image]):
            row, column = divmod(number, self.per_row)
            left = MARGIN + column * self.cell_width
            if self.drawing.has_students and row == 0:
                for panel, heading in enumerate(self.drawing.headings):
                    self.sheet.write(left + panel * (self.panel + GAP), top - NAME, heading, color=GREY)
            self._draw_cell(cell, image, left, top + row * self.row_height)

    def _draw_cell(self, cell: Cell, image: int, left: float, top: float) -> None:
        name, weight = cell.name, "bold" if cell.is_trained else "normal"
        if len(name) > MOST_CHARACTERS_OF_NAME:
            name = f"{name[: MOST_CHARACTERS_OF_NAME - 1]}…"
        self.sheet.write(left, top + NAME - 0.03, name, va="bottom", weight=weight)
        heats = [(heat, SHARES, self.share, percent(heat.sum())) for heat in cell.shares]
        if self.drawing.has_students:
            change = f"{100 * cell.difference.sum():+.0f} pt".replace("-", "−")
            heats.append((cell.difference, DIFFERENCES, self.difference, change))
        for heat, colours, scale, number in heats:
            self.sheet.write(
                left + self.panel, top + NAME - 0.03, number, va="bottom", ha="right", color=GREY
            )
            place, picture = Square(left, top + NAME, self.panel), self.inspection.images[image]
            draw_heat(self.sheet.axes, picture, heat, place, colours=colours, scale=scale)
            self._outline(image, place)
            left += self.panel + GAP

    def _outline(self, image: int, place: Square) -> None:
        outline(
            self.sheet.axes, self.inspection.focus[image].tolist(), place, grid=self.inspection.grids[image]
        )

    def _wrap_words(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the lines beside the first image: key, conversation (a long turn is cut), and legend."""
        width = self.width - IMAGE_PANEL - CELL_GAP
        # Widths are those of the regular weight; bold is a seventh wider.
        key = wrap(self.inspection.key, width / 1.15, size=KEY_SIZE)
        lines: list[tuple[str, dict[str, Any]]] = [
            (line, {"weight": "bold", "fontsize": KEY_SIZE}) for line in key
        ]
        for turn in self.inspection.conversations:
            turn_lines = wrap(f"{turn['from']}: {turn['value']}", width, max_lines=MOST_LINES_OF_TURN)
            lines += [(line, {}) for line in turn_lines]
        for words in self.drawing.words:
            lines += [(line, {"color": GREY}) for line in wrap(words, width)]
        return lines


def percent(share: float) -> str:
    """Return a share in percent, with two digits below 10%."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def arrange(num_cells: int, num_panels: int) -> tuple[float, int]:
    """Return the side of a panel in inches, and the number of cells in a row.

    A row has as many cells as fit, or more if the page would be much higher than wide. Panels grow into spare width.
    """
    panel = PANEL if num_panels == 1 else SMALL_PANEL
    width, height = num_panels * (panel + GAP) - GAP + CELL_GAP, NAME + panel + CELL_GAP / 2
    fitting = int((LEAST_WIDTH + CELL_GAP) / width)
    not_too_high = ceil(sqrt(num_cells * height / (MOST_HEIGHT_PER_WIDTH * width)))
    num_rows = ceil(num_cells / max(1, fitting, not_too_high))
    per_row = ceil(num_cells / num_rows)
    spare = max(0.0, LEAST_WIDTH + CELL_GAP - per_row * width) / (per_row * num_panels)
    return panel + min(spare, MOST_GROWTH), per_row


def _check(inspection: Inspection, output: Path, max_tokens: int) -> None:
    if output.suffix.lower() not in FORMATS:
        raise PipelineError(
            f"{output}: a picture can be written as {' or '.join(FORMATS)}, the name ends in {output.suffix!r}; "
            "name one of these"
        )
    if max_tokens < 1:
        raise PipelineError(f"max_tokens: expected a number of text tokens from 1 on, found {max_tokens}")
    if not inspection.images:
        raise PipelineError(
            f"sample {inspection.key!r} of {inspection.store} is text alone, no image to look at; "
            "name a sample with an image"
        )
    if (0, 0) in inspection.grids:
        raise PipelineError(
            f"sample {inspection.key!r}: the vision tokens of its image {inspection.grids.index((0, 0)) + 1} are "
            "several tiles, which no one grid shows; `alignkd inspect sample` lists them"
        )
    if not inspection.attention:
        raise PipelineError(
            f"{inspection.store} keeps none of its teacher's attention; cache into a new store with "
            "`targets.attention: {}`"
        )
