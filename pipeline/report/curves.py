"""Draw numbers: a panel of curves as SVG in the page's colours, and the plot of a sweep as files."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator

from pipeline.errors import writing

# Placeholder colours: in the page they become CSS variables, so that light, dark and print each have their own.
INK, RULE = "#000001", "#000002"
CSS = {INK: "currentColor", RULE: "var(--rule)"}
NUM_SERIES = 8
FIRST_SERIES = "#000101"
CSS |= {f"#0001{number:02x}": f"var(--series-{number})" for number in range(1, NUM_SERIES + 1)}

MAX_POINTS = 300  # a panel is 340 pixels wide: more points would not be visible
MAX_TICKS = 5
LOG_FROM = 20.0  # largest over smallest value from which a linear scale would hide the end of a curve
DASH = 4.0  # points, of each of several curves that coincide

Kind = Literal["linear", "log"]

# For the files, which have a white background: readable in grey and with colour blindness.
BLUE, GREY, PALE = "#0072b2", "#6b6b6b", "#d9d9d9"


@dataclass(frozen=True)
class Curve:
    """One run's values at its logged steps; `series` is the number of a colour of the page, from 1."""

    steps: Sequence[float]
    values: Sequence[float]
    series: int
    dashed: bool = False
    held_out: bool = False  # drawn as rings without a line


@dataclass(frozen=True)
class Scale:
    """The vertical axis of a panel; with the unit percent, shares are shown in percent."""

    low: float
    high: float
    kind: Kind = "linear"
    unit: Literal["", "percent"] = ""

    @classmethod
    def covering(cls, values: Sequence[float], kind: Kind = "linear") -> Scale:
        """Return a scale a little wider than all finite values; a logarithmic one than the positive ones."""
        lowest = 0 if kind == "log" else -math.inf
        finite = [value for value in values if lowest < value < math.inf] or [1.0]
        low, high = min(finite), max(finite)
        if kind == "log":
            return cls(low / 1.2, high * 1.2, "log")
        margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        return cls(low - margin, high + margin)

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 at the bottom to 1 at the top."""
        low, high = self.low, self.high
        if self.kind == "log":
            low, value, high = (
                math.log(number) if number > 0 else -math.inf for number in (low, value, high)
            )
        return (value - low) / (high - low)


def kind_for(panels: Iterable[Sequence[float]]) -> Kind:
    """Return one kind of scale for panels of one quantity: logarithmic if one needs it and all can have it.

    A panel can have it if most of its values are positive, and none is further below zero than a usual one is above;
    its values of zero or less are then below the axis.
    """
    finite = [[value for value in values if math.isfinite(value)] for values in panels]
    filled = [(values, [value for value in values if value > 0]) for values in finite if values]
    if any(
        2 * len(positive) <= len(values) or -min(values) > median(positive) for values, positive in filled
    ):
        return "linear"
    return "log" if any(max(positive) / min(positive) >= LOG_FROM for _, positive in filled) else "linear"


@dataclass(frozen=True)
class Frame:
    """Both axes of a panel: the scale and name of the values, and all steps that a panel of the page has."""

    scale: Scale
    name: str
    steps: Sequence[float]


def draw_panel(groups: Sequence[Sequence[Curve]], frame: Frame, *, label: str) -> str:
    """Return curves over optimizer steps as an `<svg>` for a page; `label` is for screen readers.

    Curves of one group coincide: their colours take turns along the line.
    """
    return inline(panel_figure(groups, frame), label)


def panel_figure(groups: Sequence[Sequence[Curve]], frame: Frame) -> Figure:
    """Draw a panel in its placeholder colours."""
    figure = Figure(figsize=(3.3, 2.2))
    axes = figure.add_axes((0.19, 0.21, 0.76, 0.76))
    for group in groups:
        series = sorted({curve.series for curve in group})
        for curve in group:
            _draw_curve(axes, curve, turn=series.index(curve.series), turns=len(series))
    _style(axes, ink=INK, rule=RULE, grid="y")
    axes.set_xlabel("optimizer step", fontsize=8, color=INK)
    axes.set_ylabel(frame.name, fontsize=8, color=INK)
    axes.set_xticks(step_ticks(frame.steps))
    first, last = min(frame.steps), max(frame.steps)
    margin = 0.03 * (last - first) or 1.0
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    _scale_vertically(axes, frame.scale)
    return figure


def _draw_curve(axes: Axes, curve: Curve, *, turn: int, turns: int) -> None:
    steps, values = thinned(curve.steps), thinned(curve.values)
    style: Any = (0, (4, 2)) if curve.dashed else "-"
    if turns > 1:
        style = (DASH * ((turns - turn) % turns), (DASH, DASH * (turns - 1)))
    colour = f"#0001{curve.series:02x}"
    if curve.held_out:
        axes.plot(steps, values, "o", mfc="none", mec=colour, ms=4, mew=0.9)
        return
    marker = "." if len(steps) == 1 else ""
    axes.plot(
        steps, values, color=colour, linewidth=0.9, linestyle=style, marker=marker, dash_capstyle="butt"
    )


def step_ticks(steps: Iterable[float]) -> list[float]:
    """Return at most `MAX_TICKS` of the steps, evenly counted, the last among them."""
    known = sorted(set(steps))
    return known[::-1][:: -(-len(known) // MAX_TICKS)][::-1]


def thinned(numbers: Sequence[float]) -> list[float]:
    """Return at most `MAX_POINTS` numbers: the means of neighbours."""
    size = max(1, math.ceil(len(numbers) / MAX_POINTS))
    return [fmean(numbers[start : start + size]) for start in range(0, len(numbers), size)]


def draw_sweep(
    summary_rows: Sequence[Mapping[str, Any]],
    output_png: Path,
    output_svg: Path,
    *,
    teacher: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> None:
    """Draw the `rows` of a sweep's summary: for each test set the accuracy of each seed, and the gain's interval.

    `teacher`, from the summary, is test set -> question type -> (share correct, questions): a dashed line.
    """
    test_sets = list(dict.fromkeys(row["test_set"] for row in summary_rows))
    blocks = [[row for row in summary_rows if row["test_set"] == name] for name in test_sets]
    height = sum(0.3 * len(block) + 0.75 for block in blocks) + 0.1
    longest = max(len(row["label"]) for row in summary_rows)
    figure = Figure(figsize=(max(9.0, 6.4 + 0.07 * longest), height), layout="constrained")
    grid = figure.subplots(
        len(blocks), 2, squeeze=False, sharex="col", sharey="row", height_ratios=[len(b) + 2 for b in blocks]
    )
    for (left, right), name, block in zip(grid, test_sets, blocks, strict=True):
        _draw_accuracy(left, block, teacher[name]["all"][0] if teacher and name in teacher else None)
        _draw_gain(right, block)
        left.set_title(f"{name}: {block[0]['questions']:,} questions", loc="left", fontsize=10, weight="bold")
    grid[-1][0].set_xlabel("accuracy, %: dot the mean, rings the seeds", fontsize=9)
    grid[-1][1].set_xlabel("gain over labels only, points, 95% interval", fontsize=9)
    with (
        writing(output_png.parent),
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}),
    ):
        figure.savefig(output_png, format="png", dpi=160)
        figure.savefig(output_svg, format="svg", metadata={"Date": None})


def _draw_accuracy(axes: Axes, rows: Sequence[Mapping[str, Any]], teacher: float | None) -> None:
    for place, row in enumerate(rows):
        colour = GREY if row["gain"] is None else BLUE
        seeds = [100 * share for share in row["accuracy_by_seed"]]
        axes.plot(seeds, [place] * len(seeds), "o", mfc="none", mec=colour, ms=5, mew=0.8)
        axes.plot([100 * row["accuracy"]], [place], "o", color=colour, ms=5)
    if teacher is not None:
        axes.axvline(100 * teacher, color=GREY, linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate("teacher", (100 * teacher, 1), (-3, -2), ("data", "axes fraction"), "offset points",
                      ha="right", va="top", fontsize=8, color=GREY)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -1.1)
    _style(axes, ink="#1a1a1a", rule=PALE, grid="x")


def _draw_gain(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(rows):
        if gain := row["gain"]:
            low, middle, high = (100 * gain[name] for name in ("low", "difference", "high"))
            axes.plot([low, high], [place, place], color=BLUE, linewidth=1.6, solid_capstyle="butt")
            axes.plot([middle], [place], "o", color=BLUE, ms=5)
    _style(axes, ink="#1a1a1a", rule=PALE, grid="x")


def _style(axes: Axes, *, ink: str, rule: str, grid: Literal["x", "y"]) -> None:
    """Draw no frame and no ticks, only a base line and a grid."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(rule)
    axes.tick_params(length=0, labelsize=8, labelcolor=ink)
    axes.grid(axis=grid, color=rule, linewidth=0.6)


def _scale_vertically(axes: Axes, scale: Scale) -> None:
    axes.set_yscale(scale.kind)
    axes.set_ylim(scale.low, scale.high)
    if scale.kind == "log":
        axes.yaxis.set_major_locator(_log_ticks(scale.high / scale.low))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    factor, sign = (100, "%") if scale.unit == "percent" else (1, "")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.5g}{sign}"))


def _log_ticks(span: float) -> Locator:
    """Return the ticks of a logarithmic axis; one that covers less than a decade has those of a linear one."""
    if span < 10:
        return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    subs = (1.0, 2.0, 5.0) if span < 50 else (1.0, 3.0) if span < 1000 else (1.0,)
    return LogLocator(subs=subs, numticks=8)


def inline(figure: Figure, label: str) -> str:
    """The figure as an element of a page: no prolog, namespaces or fonts; ids of its own, the page's colours."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    start = f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">'
    text = start + text[text.index(">") + 1 :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return re.sub(r"#000[01]\w{2}", lambda colour: CSS.get(colour[0], colour[0]), text)
