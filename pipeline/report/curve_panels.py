"""The loss curves of a report: for each term a panel of raw, weighted and gradient share, a colour a variation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.curves import MAX_POINTS, NUM_SERIES, Curve, Scale, draw_panel
from pipeline.report.findings import Findings, TrainingRun

KINDS = {
    "raw": "loss/{}",
    "weighted": "loss/{}_weighted",
    "share of gradient norm": "gradient_share/{}",
}
SHARE = "share of gradient norm"


@dataclass(frozen=True)
class Series:
    """A variation in the legend."""

    label: str
    number: int
    dashed: bool


@dataclass(frozen=True)
class CurvePanels:
    """`rows`: term -> one `<svg>` for each of `kinds`, '' where nothing was logged."""

    kinds: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    series: tuple[Series, ...]
    not_drawn: tuple[str, ...]  # variations beyond the colours
    num_runs: int
    num_gone: int  # runs whose folders are no longer there
    points_are_means: bool


def draw_curves(findings: Findings) -> CurvePanels:
    """All panels; those of the weighted terms share one scale, so that terms can be compared."""
    baselines = {result.label for result in findings.results if result.is_baseline}
    labels = findings.labels()
    series = [Series(label, n, label in baselines) for n, label in enumerate(labels[:NUM_SERIES], start=1)]
    drawn = {s.label: s for s in series}
    runs = [run for run in findings.runs if run.history and run.label in drawn]
    terms = list(dict.fromkeys(term for run in runs for term in run.terms))
    curves = {
        (term, kind): _curves(runs, drawn, KINDS[kind].format(term)) for term in terms for kind in KINDS
    }
    kinds = tuple(kind for kind in KINDS if any(curves[term, kind] for term in terms))
    scales = _scales(curves)
    return CurvePanels(
        kinds=kinds,
        rows={
            term: tuple(_panel(curves[term, kind], scales[term, kind], term, kind) for kind in kinds)
            for term in terms
        },
        series=tuple(s for s in series if any(run.label == s.label for run in runs)),
        not_drawn=tuple(labels[NUM_SERIES:]),
        num_runs=len(runs),
        num_gone=sum(run.history is None for run in findings.runs),
        points_are_means=any(len(run.history or ()) > MAX_POINTS for run in runs),
    )


def _curves(runs: Sequence[TrainingRun], drawn: dict[str, Series], key: str) -> list[Curve]:
    curves = []
    for run in runs:
        lines = [line for line in run.history or () if key in line.values]
        if lines:
            series = drawn[run.label]
            values = [line.values[key] for line in lines]
            curves.append(Curve([line.step for line in lines], values, series.number, series.dashed))
    return curves


def _scales(curves: dict[tuple[str, str], list[Curve]]) -> dict[tuple[str, str], Scale]:
    def covering(*panels: list[Curve]) -> Scale:
        return Scale.covering([value for panel in panels for curve in panel for value in curve.values])

    scales = {key: covering(panel) for key, panel in curves.items()}
    weighted = covering(*(panel for (_, kind), panel in curves.items() if kind == "weighted"))
    for key in scales:
        if key[1] == "weighted":
            scales[key] = weighted
        elif key[1] == SHARE:
            scales[key] = Scale(0.0, 1.04, unit="percent")
    return scales


def _panel(curves: list[Curve], scale: Scale, term: str, kind: str) -> str:
    return draw_panel(curves, scale, label=f"{term}: {kind}, over optimizer steps") if curves else ""
