"""Gathers what a run, an experiment or a sweep left in its folder into the numbers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered, gap_closed, paired_gain, questions_of
from pipeline.evaluation.evaluate import (
    PREDICTIONS_FILE,
    Prediction,
    accuracy_by_type,
    by_test_set,
    read_predictions,
)
from pipeline.evaluation.experiment import BASELINE, DISTILLED
from pipeline.report.cost import cost_of_store
from pipeline.report.findings import Findings, Origin, Result, Scores, gaps_closed
from pipeline.report.run_folder import PROVENANCE, named_if_damaged, origin_of, read_json, read_run
from pipeline.report.sweep_folder import SweepFolder
from pipeline.sweep.lines import SWEEP

DISTILLED_FOLDER, BASELINE_FOLDER, TEACHER_FOLDER = "align_kd", "supervised", "teacher"

NOT_MEASURED = (
    "The teacher was not evaluated on these questions; `alignkd evaluate` with the same config does it."
)

Answers = dict[str, list[Prediction]]  # by test set


def gather(folder: Path) -> Findings:
    """Everything that is there. Raises `PipelineError` if the folder is none of the three, or a file is damaged."""
    if (folder / SWEEP).is_file():
        return _gather_sweep(folder)
    if (folder / STATE_FILE).is_file():
        return _gather_trainings(folder, {folder.resolve().name: folder}, kind="run")
    runs = {DISTILLED: folder / DISTILLED_FOLDER, BASELINE: folder / BASELINE_FOLDER}
    if (runs[DISTILLED] / STATE_FILE).is_file():
        there = {label: run for label, run in runs.items() if (run / STATE_FILE).is_file()}
        return _gather_trainings(folder, there, kind="experiment")
    found = (
        "no such folder"
        if not folder.is_dir()
        else f"no {SWEEP}, no {STATE_FILE} and no {DISTILLED_FOLDER}/{STATE_FILE} in it"
    )
    raise PipelineError(
        f"{folder}: {found}; give the folder of a finished sweep, a finished training, "
        "or the output_dir of `alignkd distill`"
    )


def _gather_sweep(folder: Path) -> Findings:
    sweep = SweepFolder(folder)
    runs, teacher = sweep.runs(), sweep.teacher()
    with named_if_damaged(folder / SWEEP):
        config, varied, made = sweep.settings["config"], sweep.varied(), sweep.settings.get("provenance")
        own = Origin.of(made) if made else Origin()
        store, store_absent = cost_of_store(config, runs, varied=varied)
    of_runs = origin_of(sweep.run_folders())
    return Findings(
        kind="sweep",
        name=folder.resolve().name,
        config=config,
        varied=varied,
        origin=of_runs if of_runs.created else own,
        results=sweep.results(),
        teacher=teacher,
        teacher_absent="" if teacher else NOT_MEASURED,
        questions=sweep.questions(),
        runs=runs,
        store=store,
        store_absent=store_absent,
    )


def _gather_trainings(folder: Path, folders: Mapping[str, Path], *, kind: Any) -> Findings:
    """One training, or an experiment's two, the labels-only one last."""
    runs = tuple(read_run(run, label) for label, run in folders.items())
    first = next(iter(folders.values()))
    made = read_json(first / PROVENANCE)
    with named_if_damaged(first / PROVENANCE):
        config = made["config"]
        store, store_absent = cost_of_store(config, runs, varied={})
    answers = {label: _answers(run) for label, run in folders.items() if (run / PREDICTIONS_FILE).is_file()}
    teacher, teacher_absent = _teacher(folder, answers)
    return Findings(
        kind=kind,
        name=folder.resolve().name,
        config=config,
        varied={},
        origin=origin_of(folders.values()),
        results=_results(answers, teacher),
        teacher=teacher,
        teacher_absent=teacher_absent,
        questions=_question_counts(answers),
        runs=runs,
        store=store,
        store_absent=store_absent,
    )


def _answers(folder: Path) -> Answers:
    return by_test_set(read_predictions(folder / PREDICTIONS_FILE))


def _teacher(folder: Path, answers: Mapping[str, Answers]) -> tuple[dict[str, Scores], str]:
    """Its scores on the students' questions by test set; else none, and why."""
    # Of one training of an experiment, the teacher's answers lie beside its folder.
    places = (folder / TEACHER_FOLDER, folder.resolve().parent / TEACHER_FOLDER)
    measured = next((place for place in places if (place / PREDICTIONS_FILE).is_file()), None)
    if measured is None or not answers:
        return {}, NOT_MEASURED
    teacher = _answers(measured)
    if questions_of(teacher) != questions_of(next(iter(answers.values()))):
        return {}, (
            f"{TEACHER_FOLDER}/{PREDICTIONS_FILE} answers other questions than the students, so the teacher is left "
            "out; `alignkd evaluate` with the same config asks it these."
        )
    return {test_set: accuracy_by_type(predictions) for test_set, predictions in teacher.items()}, ""


def _results(answers: Mapping[str, Answers], teacher: Mapping[str, Scores]) -> tuple[Result, ...]:
    test_sets = list(next(iter(answers.values()), {}))
    baseline = answers.get(BASELINE, {})
    return tuple(
        _result(label, test_set, answered[test_set], baseline.get(test_set), teacher.get(test_set))
        for test_set in test_sets
        for label, answered in answers.items()
        if test_set in answered
    )


def _result(
    label: str,
    test_set: str,
    answered: Sequence[Prediction],
    baseline: Sequence[Prediction] | None,
    teacher: Scores | None,
) -> Result:
    """One training on one test set; held against the labels-only one, if there is one and this is not it."""
    shares = _shares(answered)
    by_type = {name: share for name, share in shares.items() if name != "all"}
    none = _shares(baseline) if baseline and label != BASELINE else None
    return Result(
        label=label,
        test_set=test_set,
        accuracy=shares["all"],
        by_seed=(shares["all"],),
        by_type=by_type,
        num_questions=len(answered),
        is_baseline=label == BASELINE,
        gain=paired_gain([Answered.of(answered)], [Answered.of(baseline)]) if baseline and none else None,
        gap_closed=gap_closed(shares["all"], none["all"], teacher["all"][0]) if none and teacher else None,
        gap_by_type=gaps_closed(by_type, none, teacher) if none and teacher else {},
    )


def _shares(answered: Sequence[Prediction]) -> dict[str, float]:
    return {name: share for name, (share, _) in accuracy_by_type(answered).items()}


def _question_counts(answers: Mapping[str, Answers]) -> dict[str, dict[str, int]]:
    first = next(iter(answers.values()), {})
    return {
        test_set: {name: number for name, (_, number) in accuracy_by_type(predictions).items()}
        for test_set, predictions in first.items()
    }
