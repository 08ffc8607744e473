"""Size against accuracy, one point a runtime: what do fewer bits cost?"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from pipeline.errors import writing
from pipeline.phone.result import BenchResult
from pipeline.readable import readable_bytes

BLUE, GREY = "#0072b2", "#6b6b6b"
ROOM = 0.6  # points above and below, for the names


def draw_bench(result: BenchResult, *files: Path) -> None:
    """Write the plot into files whose endings say the format."""
    figure = bench_figure(result)
    for file in files:
        with writing(file):
            figure.savefig(file, dpi=150)


def bench_figure(result: BenchResult, *, ink: str = GREY, point: str = BLUE) -> Figure:
    """Return the plot. Bars are the 95% interval of the difference to PyTorch on the same questions."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    base = result.rows[0].accuracy
    for number, row in enumerate(result.rows):
        below, above = 0.0, 0.0
        if row.difference is not None:
            below, above = (abs(100 * (row.difference[side] - row.difference[0])) for side in (1, 2))
        middle = 100 * row.accuracy
        axes.errorbar([row.bytes], [middle], [[below], [above]], fmt="o", color=point, ecolor=ink, capsize=3)
        above_point = number % 2 == 0  # neighbours' names do not meet
        axes.annotate(
            row.name,
            (row.bytes, middle + above if above_point else middle - below),
            xytext=(0, 7 if above_point else -15),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=ink,
        )
    axes.axhline(100 * base, color=ink, linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: readable_bytes(size)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlabel("size of the files", color=ink)
    axes.set_ylabel(f"accuracy, % of {result.questions:,} questions", color=ink)
    axes.margins(x=0.18)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low - ROOM), min(100.0, high) + ROOM)
    axes.tick_params(colors=ink)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
