"""Accuracy kept against whole-answer speed-up, of every setting that was measured: pruning, drafts, and both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.ratios import Ratios
from pipeline.twig.evaluation.curves import COLOURS, GREY, PANEL, add_legend, axes_of, look_of, percent, style
from pipeline.twig.evaluation.result import Evaluation, Interval
from pipeline.twig.evaluation.scoring import LONG, SHORT
from pipeline.twig.evaluation.selectors import TWIG
from pipeline.twig.evaluation.ways import GENERATE, NO_TWIG, WITH_TWIG, kept_way

PRUNING, BOTH = "pruning alone", "pruning and drafts"
ALL = Interval(1.0, 1.0, 1.0)  # the text is the base's own
AS_FAST = Ratios(1.0, 1.0, 1.0)  # of the base itself


@dataclass(frozen=True)
class Setting:
    """A way to answer: how many times as fast it is than the base alone, and the accuracy that it keeps."""

    way: str
    line: str
    faster: Ratios | None
    kept: Interval


def settings_of(result: Evaluation, test_set: str, kind: str) -> list[Setting]:
    """Return every setting whose speed and accuracy are known, line by line, from all tokens to the fewest."""
    speeds = {row.way: row.time_ratio for row in result.speed if row.kind == kind}
    rows = sorted(result.rows(test_set, kind, TWIG), key=lambda row: -row.share)
    kept = {kept_way(row.keep): row.kept for row in rows}
    found = [Setting(NO_TWIG, PRUNING, None, ALL)] if NO_TWIG in speeds else []
    found += [
        Setting(way, PRUNING, speeds[way], share) for way, share in kept.items() if way in speeds and share
    ]
    drafts = {WITH_TWIG: ALL} | {f"{WITH_TWIG}, {way}": share for way, share in kept.items()}
    found += [
        Setting(way, BOTH, speeds[way], share) for way, share in drafts.items() if way in speeds and share
    ]
    known = {setting.way for setting in found} | {GENERATE}
    return found + [Setting(way, way, speeds[way], ALL) for way in speeds if way not in known]


def tradeoff_figure(
    result: Evaluation, *, ink: str = GREY, colours: Sequence[str] = COLOURS
) -> Figure | None:
    """Return a panel for each test set and kind of answers: a line without drafts, and one with them."""
    panels = [
        (test_set, kind, settings)
        for test_set in result.test_sets()
        for kind in (SHORT, LONG)
        if len(settings := settings_of(result, test_set, kind)) > 1
    ]
    if not panels:
        return None
    lines = list(dict.fromkeys(setting.line for _, _, settings in panels for setting in settings))
    figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
    for axes, (test_set, kind, settings) in zip(axes_of(figure, len(panels)), panels, strict=True):
        for number, line in enumerate(lines):
            of_line = [setting for setting in settings if setting.line == line]
            _draw_line(axes, of_line, line, look_of(number, colours))
        title = f"{kind} answers" + (f", {test_set}" if len(result.test_sets()) > 1 else "")
        style(axes, title, "times as fast, whole answers", "accuracy kept", ink)
        axes.yaxis.set_major_formatter(FuncFormatter(percent))
    add_legend(figure, ink)
    return figure


def _draw_line(axes: Axes, settings: Sequence[Setting], name: str, look: dict[str, Any]) -> None:
    ratios = [one.faster or AS_FAST for one in settings]
    middles = [ratio.median for ratio in ratios]
    spread = [[ratio.median - ratio.low for ratio in ratios], [ratio.high - ratio.median for ratio in ratios]]
    kept = [one.kept.value for one in settings]
    errors = [
        [max(0.0, one.kept.value - one.kept.low) for one in settings],
        [max(0.0, one.kept.high - one.kept.value) for one in settings],
    ]
    axes.errorbar(middles, kept, errors, spread, label=name, ms=4, linewidth=1, elinewidth=0.6, **look)
    for x, y, one in zip(middles, kept, settings, strict=True):
        if " kept" in one.way:
            share = one.way.removeprefix(f"{WITH_TWIG}, ").removesuffix(" kept")
            axes.annotate(share, (x, y), (3, 3), textcoords="offset points", fontsize=6, color=look["color"])
