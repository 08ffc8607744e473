"""The loss curves of a report: for each term a panel of raw, weighted and gradient share, a colour a variation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from pipeline.report.curves import MAX_POINTS, NUM_SERIES, Curve, Scale, draw_panel
from pipeline.report.findings import Findings
from pipeline.report.training_run import TrainingRun

WEIGHTED, SHARE = "weighted", "share of gradient norm"
KINDS = {"raw": "loss/{}", WEIGHTED: "loss/{}_weighted", SHARE: "gradient_share/{}"}


def draw_curves(findings: Findings) -> dict[str, Any]:
    """Draw all panels, and return what the page says of them.

    `rows` is term -> one `<svg>` for each of `kinds`, '' where nothing was logged. `legend` holds the variations
    drawn, `not_drawn` those beyond the colours; `num_gone` counts runs whose folders are gone. Panels of the weighted
    terms share one scale, so that terms can be compared.
    """
    baselines = {result.label for result in findings.results if result.is_baseline}
    labels = findings.labels()
    number_of = {label: number for number, label in enumerate(labels[:NUM_SERIES], start=1)}
    runs = [run for run in findings.runs if run.history and run.label in number_of]
    terms = dict.fromkeys(term for run in runs for term in run.terms)
    curves = {
        (term, kind): [
            curve for run in runs if (curve := _curve(run, key.format(term), number_of, baselines))
        ]
        for term in terms
        for kind, key in KINDS.items()
    }
    weighted = _covering(
        [curve for (_, kind), panel in curves.items() if kind == WEIGHTED for curve in panel]
    )
    fixed = {WEIGHTED: weighted, SHARE: Scale(0.0, 1.04, unit="percent")}

    def panel(term: str, kind: str) -> str:
        drawn, label = curves[term, kind], f"{term}: {kind}, over optimizer steps"
        return draw_panel(drawn, fixed.get(kind) or _covering(drawn), label=label) if drawn else ""

    kinds = [kind for kind in KINDS if any(curves[term, kind] for term in terms)]
    return {
        "kinds": kinds,
        "rows": {term: [panel(term, kind) for kind in kinds] for term in terms},
        "legend": [
            {"label": label, "number": number, "dashed": label in baselines}
            for label, number in number_of.items()
            if any(run.label == label for run in runs)
        ],
        "not_drawn": labels[NUM_SERIES:],
        "num_runs": len(runs),
        "num_gone": sum(run.history is None for run in findings.runs),
        "points_are_means": any(len(run.history or ()) > MAX_POINTS for run in runs),
    }


def _curve(run: TrainingRun, key: str, number_of: Mapping[str, int], baselines: Set[str]) -> Curve | None:
    entries = [entry for entry in run.history or () if key in entry]
    steps, values = ([entry[name] for entry in entries] for name in ("step", key))
    return Curve(steps, values, number_of[run.label], run.label in baselines) if entries else None


def _covering(curves: Sequence[Curve]) -> Scale:
    return Scale.covering([value for curve in curves for value in curve.values])
