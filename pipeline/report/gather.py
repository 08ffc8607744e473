"""Gather the findings of a run, an experiment or a sweep from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered, questions_of
from pipeline.evaluation.experiment import BASELINE, DISTILLED
from pipeline.evaluation.predictions import (
    PREDICTIONS_FILE,
    Prediction,
    accuracy_by_type,
    by_test_set,
    read_predictions,
)
from pipeline.phone.result import RESULT, BenchResult
from pipeline.report.cost import cost_of_store
from pipeline.report.findings import Findings, Origin, Result
from pipeline.report.run_folder import PROVENANCE, named_if_damaged, origin_of, read_json, read_run
from pipeline.report.sweep_folder import NOT_MEASURED, gather_sweep, question_counts
from pipeline.report.training_run import TrainingRun
from pipeline.sweep.lines import SWEEP
from pipeline.sweep.summary import rows_of
from pipeline.twig.evaluation import result as twig_result

DISTILLED_FOLDER, BASELINE_FOLDER, TEACHER_FOLDER = "align_kd", "supervised", "teacher"
PHONE_FOLDER = "phone"

Predictions = Mapping[str, list[Prediction]]  # by test set


def gather(folder: Path) -> Findings:
    """Return all that a folder holds. Raises `PipelineError` if it is none of the three, or a file is damaged."""
    findings, measured = _gather(folder), folder / PHONE_FOLDER / RESULT
    if measured.is_file():
        findings = replace(findings, phone=BenchResult.read(measured))
    evaluated = folder / twig_result.FOLDER / twig_result.RESULT
    if not evaluated.is_file():
        return findings
    picture = evaluated.with_name(twig_result.PICTURE)
    return replace(
        findings,
        twig=twig_result.Evaluation.read(evaluated),
        twig_picture=picture.read_bytes() if picture.is_file() else b"",
    )


def _gather(folder: Path) -> Findings:
    if (folder / SWEEP).is_file():
        return gather_sweep(folder)
    if (folder / STATE_FILE).is_file():
        return _gather_trainings(folder, {folder.resolve().name: folder}, kind="run")
    runs = {DISTILLED: folder / DISTILLED_FOLDER, BASELINE: folder / BASELINE_FOLDER}
    runs = {label: run for label, run in runs.items() if (run / STATE_FILE).is_file()}
    if DISTILLED in runs:
        return _gather_trainings(folder, runs, kind="experiment")
    if (folder / twig_result.FOLDER / twig_result.RESULT).is_file():
        return _twigs_alone(folder)
    found = f"no {SWEEP}, no {STATE_FILE} and no {DISTILLED_FOLDER}/{STATE_FILE} in it"
    raise PipelineError(
        f"{folder}: {found if folder.is_dir() else 'no such folder'}; give the folder of a finished sweep, "
        "a finished training, or the output_dir of `alignkd distill`"
    )


def _twigs_alone(folder: Path) -> Findings:
    """An evaluation of twigs that were trained elsewhere."""
    file = folder / twig_result.FOLDER / twig_result.RESULT
    made = twig_result.Evaluation.read(file).provenance
    with named_if_damaged(file):
        config, origin = made["config"], Origin.of([made])
    return Findings(
        kind="run",
        name=folder.resolve().name,
        config=config,
        varied={},
        origin=origin,
        results=(),
        teacher={},
        teacher_absent=NOT_MEASURED,
        questions={},
        runs=(),
        store=None,
        store_absent="No training lies in this folder.",
    )


def _gather_trainings(
    folder: Path, folders: Mapping[str, Path], *, kind: Literal["run", "experiment"]
) -> Findings:
    """One training, or an experiment's two, treated as a sweep of one seed."""
    runs = tuple(TrainingRun.of(*read_run(run, label)) for label, run in folders.items())
    provenance = next(iter(folders.values())) / PROVENANCE
    made = read_json(provenance)
    with named_if_damaged(provenance):
        config = made["config"]
        store, store_absent = cost_of_store(config, runs, varied={})
    predictions = {
        label: by_test_set(read_predictions(run / PREDICTIONS_FILE))
        for label, run in folders.items()
        if (run / PREDICTIONS_FILE).is_file()
    }
    answers = {label: _answered(of_run) for label, of_run in predictions.items()}
    lines = {
        label: {"name": label, "values": {}, "baseline": BASELINE, "accuracy": _accuracy(of_run)}
        for label, of_run in predictions.items()
    }
    of_teacher, teacher_absent = _teacher(folder, predictions)
    teacher = _accuracy(of_teacher)
    rows = rows_of({label: [line] for label, line in lines.items()}, lines, answers, _answered(of_teacher))
    return Findings(
        kind=kind,
        name=folder.resolve().name,
        config=config,
        varied={},
        origin=origin_of(folders.values()),
        results=tuple(
            Result.of(row, baselines=[BASELINE], teacher=teacher.get(row["test_set"])) for row in rows
        ),
        teacher=teacher,
        teacher_absent=teacher_absent,
        questions=question_counts(list(lines.values())),
        runs=runs,
        store=store,
        store_absent=store_absent,
    )


def _answered(predictions: Predictions) -> dict[str, Answered]:
    return {test_set: Answered.of(of_set) for test_set, of_set in predictions.items()}


def _accuracy(predictions: Predictions) -> dict[str, dict[str, tuple[float, int]]]:
    return {test_set: accuracy_by_type(of_set) for test_set, of_set in predictions.items()}


def _teacher(folder: Path, students: Mapping[str, Predictions]) -> tuple[Predictions, str]:
    """The teacher's predictions of the students' questions; else none, and why."""
    # For one training of an experiment, the teacher's lie beside its folder.
    places = (folder / TEACHER_FOLDER, folder.resolve().parent / TEACHER_FOLDER)
    files = [place / PREDICTIONS_FILE for place in places if (place / PREDICTIONS_FILE).is_file()]
    if not files or not students:
        return {}, NOT_MEASURED
    teacher = by_test_set(read_predictions(files[0]))
    if questions_of(teacher) != questions_of(next(iter(students.values()))):
        return {}, (
            f"{TEACHER_FOLDER}/{PREDICTIONS_FILE} answers other questions than the students, so the teacher is left "
            "out; `alignkd evaluate` with the same config asks it these."
        )
    return teacher, ""
