"""The loss curves of a report: for each term a panel of raw, weighted and gradient share, a colour a variation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.curves import MAX_POINTS, NUM_SERIES, Curve, Scale, draw_panel
from pipeline.report.findings import Findings, TrainingRun

WEIGHTED, SHARE = "weighted", "share of gradient norm"
KINDS = {"raw": "loss/{}", WEIGHTED: "loss/{}_weighted", SHARE: "gradient_share/{}"}


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
    num_gone: int  # runs whose folders are gone
    points_are_means: bool


def draw_curves(findings: Findings) -> CurvePanels:
    """Draw all panels. Those of the weighted terms share one scale, so that terms can be compared."""
    baselines = {result.label for result in findings.results if result.is_baseline}
    labels = findings.labels()
    series = {
        label: Series(label, number, label in baselines)
        for number, label in enumerate(labels[:NUM_SERIES], start=1)
    }
    runs = [run for run in findings.runs if run.history and run.label in series]
    terms = dict.fromkeys(term for run in runs for term in run.terms)
    curves = {
        (term, kind): _curves(runs, series, key.format(term)) for term in terms for kind, key in KINDS.items()
    }
    kinds = tuple(kind for kind in KINDS if any(curves[term, kind] for term in terms))
    weighted = _covering(
        [curve for (_, kind), panel in curves.items() if kind == WEIGHTED for curve in panel]
    )

    def panel(term: str, kind: str) -> str:
        drawn = curves[term, kind]
        fixed = {WEIGHTED: weighted, SHARE: Scale(0.0, 1.04, unit="percent")}
        label = f"{term}: {kind}, over optimizer steps"
        return draw_panel(drawn, fixed.get(kind) or _covering(drawn), label=label) if drawn else ""

    return CurvePanels(
        kinds=kinds,
        rows={term: tuple(panel(term, kind) for kind in kinds) for term in terms},
        series=tuple(s for s in series.values() if any(run.label == s.label for run in runs)),
        not_drawn=tuple(labels[NUM_SERIES:]),
        num_runs=len(runs),
        num_gone=sum(run.history is None for run in findings.runs),
        points_are_means=any(len(run.history or ()) > MAX_POINTS for run in runs),
    )


def _curves(runs: Sequence[TrainingRun], series: Mapping[str, Series], key: str) -> list[Curve]:
    curves = []
    for run in runs:
        if entries := [entry for entry in run.history or () if key in entry]:
            own = series[run.label]
            steps, values = ([entry[name] for entry in entries] for name in ("step", key))
            curves.append(Curve(steps, values, own.number, own.dashed))
    return curves


def _covering(curves: Sequence[Curve]) -> Scale:
    return Scale.covering([value for curve in curves for value in curve.values])
