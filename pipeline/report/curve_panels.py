"""The loss curves of a report: for each term a panel of raw, weighted and gradient share, a colour a variation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from pipeline.report.coinciding import groups_of, sentence
from pipeline.report.curves import MAX_POINTS, NUM_SERIES, Curve, Frame, Scale, draw_panel, kind_for
from pipeline.report.findings import Findings
from pipeline.report.training_run import TrainingRun

RAW, WEIGHTED, SHARE, OBSERVED = "raw", "weighted", "share of gradient norm", "observed"
HELD_OUT = "held_out/{}"  # raw or observed, too
OF_OBSERVED = "observed/{}"
KINDS = {RAW: "loss/{}", WEIGHTED: "loss/{}_weighted", SHARE: "gradient_share/{}"}
NATS, SQUARE = "nats", "mean square"
UNITS = {"supervised": NATS, "logits": NATS, "vision_all": SQUARE, "vision_focus": SQUARE}
UNITS |= {
    "policy/reward": "log probability, nats",
    "policy/entropy": NATS,
    "policy/overlap": "share of tokens",
}
# Held out, `policy` is minus `policy/reward`, which has a panel, and the one choice is the best: its overlap is 1.
NO_RINGS = {"policy", "policy/overlap"}


@dataclass(frozen=True)
class Panel:
    """An `<svg>`, '' where nothing was logged, and a sentence about curves that coincide, '' where none do."""

    kind: str
    svg: str = ""
    coinciding: str = ""


def draw_curves(findings: Findings) -> dict[str, Any]:
    """Draw all panels, and return what the page says of them.

    `rows` is term -> a panel for each of `kinds`, and what is observed beside a term -> its panel. `legend` holds the
    variations drawn, `not_drawn` those beyond the colours; `num_gone` counts runs whose folders are gone; `held_out`
    is whether held-out samples are drawn, as rings. Panels of the weighted terms share one scale, so that terms can
    be compared; those of losses are all linear or all logarithmic; all have the same steps.
    """
    baselines = {result.label for result in findings.results if result.is_baseline}
    labels = findings.labels()
    number_of = {label: number for number, label in enumerate(labels[:NUM_SERIES], start=1)}
    label_of = {number: label for label, number in number_of.items()}
    runs = [run for run in findings.runs if run.history and run.label in number_of]
    terms = dict.fromkeys(term for run in runs for term in run.terms)
    observed = _observed(runs)

    def of_runs(key: str) -> list[Curve]:
        return [curve for run in runs if (curve := _curve(run, key, number_of, baselines))]

    curves = {(term, kind): of_runs(key.format(term)) for term in terms for kind, key in KINDS.items()}
    curves |= {(name, OBSERVED): of_runs(OF_OBSERVED.format(name)) for name in observed}
    held_out = {
        (name, kind): [replace(curve, held_out=True) for curve in of_runs(HELD_OUT.format(name))]
        for name, kind in curves
        if kind in (RAW, OBSERVED) and name not in NO_RINGS
    }
    every = {place: [*drawn, *held_out.get(place, [])] for place, drawn in curves.items()}
    scales = _scales(every)
    steps = sorted({step for panel in every.values() for curve in panel for step in curve.steps})

    def panel(term: str, kind: str) -> Panel:
        drawn, scale = curves[term, kind], scales[term, kind]
        if not drawn:
            return Panel(kind)
        frame = Frame(scale, axis_name(kind, unit_of(term, findings)), steps)
        groups = [*groups_of(drawn, scale), *([curve] for curve in held_out.get((term, kind), []))]
        svg = draw_panel(groups, frame, label=f"{term}: {kind}, over optimizer steps")
        return Panel(kind, svg, sentence(drawn, scale, label_of))

    kinds = [kind for kind in KINDS if any(curves[term, kind] for term in terms)]
    return {
        "kinds": kinds,
        "rows": {
            **{term: [panel(term, kind) for kind in kinds] for term in terms},
            **{name: [panel(name, OBSERVED)] for name in observed},
        },
        "legend": [
            {"label": label, "number": number, "dashed": label in baselines}
            for label, number in number_of.items()
            if any(run.label == label for run in runs)
        ],
        "not_drawn": labels[NUM_SERIES:],
        "num_runs": len(runs),
        "num_gone": sum(run.history is None for run in findings.runs),
        "kind": scales[next(iter(scales))].kind if scales else "linear",
        "held_out": any(held_out.values()),
        "points_are_means": any(len(run.history or ()) > MAX_POINTS for run in runs),
    }


def _observed(runs: Sequence[TrainingRun]) -> list[str]:
    """Return the names of what was logged beside the losses, in order."""
    beginning = OF_OBSERVED.format("")
    keys = {key for run in runs for entry in run.history or () for key in entry if key.startswith(beginning)}
    return sorted(key.removeprefix(beginning) for key in keys)


def _curve(run: TrainingRun, key: str, number_of: Mapping[str, int], baselines: Set[str]) -> Curve | None:
    entries = [entry for entry in run.history or () if key in entry]
    steps, values = ([entry[name] for entry in entries] for name in ("step", key))
    return Curve(steps, values, number_of[run.label], run.label in baselines) if entries else None


def _scales(curves: Mapping[tuple[str, str], Sequence[Curve]]) -> dict[tuple[str, str], Scale]:
    values = {place: [value for curve in panel for value in curve.values] for place, panel in curves.items()}
    kind_of_losses = kind_for([of for (_, kind), of in values.items() if kind not in (SHARE, OBSERVED)])
    weighted = [value for (_, kind), of in values.items() if kind == WEIGHTED for value in of]
    return {
        (term, kind): Scale(0.0, 1.04, unit="percent")
        if kind == SHARE
        else Scale.covering(of)
        if kind == OBSERVED
        else Scale.covering(weighted if kind == WEIGHTED else of, kind_of_losses)
        for (term, kind), of in values.items()
    }


def unit_of(term: str, findings: Findings) -> str:
    """Return the unit of a term; '' if it is not known. Attention has one for each distance that the runs had."""
    if term != "attention":
        return UNITS.get(term, "")
    settings = (findings.config.get("losses") or {}).get(term) or {}
    distances = findings.varied.get("losses.attention.distance") or [settings.get("distance", "kl")]
    return " or ".join(dict.fromkeys(SQUARE if distance == "mse" else NATS for distance in distances))


def axis_name(kind: str, unit: str) -> str:
    """Return what stands beside the axis of a panel's values."""
    if kind == SHARE:
        return kind
    if kind == OBSERVED:
        return unit
    name = "loss" if kind == RAW else "weight × loss"
    return f"{name}, {unit}" if unit else name
