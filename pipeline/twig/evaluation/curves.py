"""Curves of an evaluation: accuracy kept against tokens kept, and speed against acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.twig.evaluation.result import Evaluation, KeptRow
from pipeline.twig.evaluation.scoring import LONG, SHORT

# Readable with colour blindness (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#1a1a1a")
GREY = "#6b6b6b"
PANEL = (3.6, 2.6)  # inches
SPREAD = 0.004  # of vision tokens, between the points of two selectors at one share
LOOKS = (("o", "-"), ("s", "--"), ("^", ":"))  # markers and lines: the next where the colours are used up


def kept_figure(result: Evaluation, *, ink: str = GREY, colours: Sequence[str] = COLOURS) -> Figure | None:
    """Return a panel for each test set and kind of answers: a line a selector, with 95% intervals."""
    panels = [
        (test_set, kind)
        for test_set in result.test_sets()
        for kind in result.kinds(test_set)
        if kind in (SHORT, LONG)
    ]
    if not panels:
        return None
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
    for axes, (test_set, kind) in zip(axes_of(figure, len(panels)), panels, strict=True):
        selectors = result.selectors()
        for number, selector in enumerate(selectors):
            rows, place = result.rows(test_set, kind, selector), number - (len(selectors) - 1) / 2
            _draw_kept(axes, rows, selector, place, look_of(number, colours))
        axes.axhline(1, color=ink, linewidth=0.6, linestyle=":")
        title = f"{kind} answers" + (f", {test_set}" if len(result.test_sets()) > 1 else "")
        style(axes, title, "vision tokens kept", "accuracy kept", ink)
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
    add_legend(figure, ink)
    return figure


def _draw_kept(axes: Axes, rows: Sequence[KeptRow], name: str, place: float, look: dict[str, Any]) -> None:
    """Draw a selector's line; `place` moves it sideways, so that intervals do not cover each other."""
    found = sorted(((row.share, row.kept) for row in rows if row.kept), key=lambda pair: pair[0])
    shares = [share + SPREAD * place for share, _ in found]
    middles = [kept.value for _, kept in found]
    errors = [
        [max(0.0, kept.value - kept.low) for _, kept in found],
        [max(0.0, kept.high - kept.value) for _, kept in found],
    ]
    axes.errorbar(shares, middles, errors, label=name, ms=3, linewidth=1, capsize=2, **look)


def look_of(number: int, colours: Sequence[str]) -> dict[str, Any]:
    """Return colour, marker and line of the `number`-th line of a picture, counted from 0."""
    repeats, place = divmod(number, len(colours))
    marker, line = LOOKS[repeats % len(LOOKS)]
    return {"color": colours[place], "marker": marker, "linestyle": line}


def speed_figure(result: Evaluation, *, ink: str = GREY, colours: Sequence[str] = COLOURS) -> Figure | None:
    """Return a panel for short and for long answers: how many times as fast each way is, by accepted drafts."""
    kinds = list(dict.fromkeys(row.kind for row in result.speed))
    ways = list(dict.fromkeys(row.way for row in result.speed if row.time_ratio))
    if not ways:
        return None
    figure = Figure(figsize=(PANEL[0] * len(kinds), PANEL[1]), layout="constrained")
    for axes, kind in zip(axes_of(figure, len(kinds)), kinds, strict=True):
        for row in result.speed:
            if row.kind == kind and (ratio := row.time_ratio):
                errors = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
                options: dict[str, Any] = look_of(ways.index(row.way), colours) | {
                    "label": row.way,
                    "linestyle": "",
                }
                options |= {"ms": 5, "capsize": 2, "elinewidth": 0.8}
                options |= {} if row.acceptance is not None else {"mfc": "none"}
                axes.errorbar([row.acceptance or 0], [ratio.median], errors, **options)
        axes.axhline(1, color=ink, linewidth=0.6, linestyle=":")
        style(axes, f"{kind} answers", "drafts accepted (rings: no drafts)", "times as fast", ink)
        axes.set_xlim(-0.05, 1.05)
        axes.xaxis.set_major_formatter(FuncFormatter(percent))
    add_legend(figure, ink)
    return figure


def axes_of(figure: Figure, number: int) -> list[Axes]:
    """Return panels side by side."""
    return list(figure.subplots(1, number, squeeze=False)[0])


def percent(share: float, _: object) -> str:
    """Format a share for an axis."""
    return f"{100 * share:.5g}%"


def style(axes: Axes, title: str, below: str, beside: str, ink: str) -> None:
    """Give a panel its texts and colours."""
    axes.set_facecolor("none")
    axes.set_title(title, fontsize=9, color=ink)
    axes.set_xlabel(below, fontsize=8, color=ink)
    axes.set_ylabel(beside, fontsize=8, color=ink)
    axes.tick_params(colors=ink, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)


def add_legend(figure: Figure, ink: str) -> None:
    """Put one legend beside all panels."""
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", fontsize=7, frameon=False, labelcolor=ink)
