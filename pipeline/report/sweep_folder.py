"""Gather the findings of a sweep from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.report.cost import cost_of_store
from pipeline.report.findings import Findings, Origin, Result, Scores
from pipeline.report.run_folder import named_if_damaged, origin_of, read_json, read_run
from pipeline.report.training_run import TrainingRun
from pipeline.sweep.lines import RUNS, SUMMARY, SWEEP, Line, read_lines
from pipeline.sweep.run import run_folder
from pipeline.sweep.variations import SEED

NOT_MEASURED = (
    "The teacher was not evaluated on these questions; `alignkd evaluate` with the same config does it."
)


def gather_sweep(folder: Path) -> Findings:
    """Return the findings of a finished sweep. Raises `PipelineError` naming a file that is damaged or missing."""
    settings, summary = read_json(folder / SWEEP), read_json(folder / SUMMARY)
    with named_if_damaged(folder / SUMMARY):
        labels = {_variation(row["variation"]): str(row["label"]) for row in summary["rows"]}
    with named_if_damaged(folder / SWEEP):
        config, identities = settings["config"], dict(settings["runs"])
    lines = read_lines(folder)
    with named_if_damaged(folder / RUNS):
        # Lines of other identities are of earlier sweeps or other settings.
        lines = [
            line | {"label": labels[_variation(line["values"])]}
            for line in lines
            if identities.get(line["name"]) == line["identity"] and _variation(line["values"]) in labels
        ]
        runs = tuple(_run(folder, line) for line in lines)
        label_of = {line["name"]: line["label"] for line in lines}
        baselines = [label_of[line["baseline"]] for line in lines if line["baseline"] in label_of]
        varied, questions = _varied(lines), question_counts(lines)
    if lost := sorted(set(labels.values()) - set(label_of.values())):
        raise PipelineError(
            f"{folder / SUMMARY} has {lost[0]!r}, {folder / RUNS} has no run of it; run `alignkd sweep` again"
        )
    with named_if_damaged(folder / SUMMARY):
        teacher: dict[str, Scores] = {
            test_set: {name: (float(share), int(number)) for name, (share, number) in scores.items()}
            for test_set, scores in (summary["teacher"] or {}).items()
        }
        results = tuple(
            Result.of(row, baselines=baselines, teacher=teacher.get(row["test_set"]))
            for row in summary["rows"]
        )
    store, store_absent = cost_of_store(config, runs, varied=varied)
    return Findings(
        kind="sweep",
        name=folder.resolve().name,
        config=config,
        varied=varied,
        origin=_origin(folder, lines, settings),
        results=results,
        teacher=teacher,
        teacher_absent="" if teacher else NOT_MEASURED,
        questions=questions,
        runs=runs,
        store=store,
        store_absent=store_absent,
    )


def question_counts(lines: Sequence[Line]) -> dict[str, dict[str, int]]:
    """Return test set -> question type -> number of questions, as the runs answered them."""
    counts: dict[str, dict[str, int]] = {}
    for line in lines:
        for test_set, scores in line["accuracy"].items():
            counts.setdefault(test_set, {}).update({name: number for name, (_, number) in scores.items()})
    return counts


def _variation(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What was varied, without the seed; values as text, since a list cannot be a key."""
    return tuple(sorted((key, repr(value)) for key, value in values.items() if key != SEED))


def _varied(lines: Sequence[Line]) -> dict[str, list[Any]]:
    """Setting -> its values, each once, in the order of the runs."""
    values: dict[str, list[Any]] = {}
    for line in lines:
        for key, value in line["values"].items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return values


def _run(folder: Path, line: Line) -> TrainingRun:
    place = folder / run_folder(line["name"])
    return TrainingRun.of(line, read_run(place)[1] if (place / STATE_FILE).is_file() else None)


def _origin(folder: Path, lines: Sequence[Line], settings: Mapping[str, Any]) -> Origin:
    """That of the runs whose folders are left, else that of the sweep."""
    if (of_runs := origin_of(folder / run_folder(line["name"]) for line in lines)).created:
        return of_runs
    with named_if_damaged(folder / SWEEP):
        return Origin.of([settings["provenance"]] if settings.get("provenance") else [])
