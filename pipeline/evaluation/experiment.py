"""One experiment: train the student (and, with `baseline`, the same student without a teacher), evaluate, compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.config import Config, labels_only
from pipeline.config.provenance import provenance, replace_text
from pipeline.config.twig_settings import check_has_student
from pipeline.distill.student import train_student, training_arguments
from pipeline.distill.training.processes import is_first_process
from pipeline.distill.training.training_folder import MODEL_FOLDER, check_inputs
from pipeline.evaluation.answer_scores import metrics_for, score_table, scores_by_type
from pipeline.evaluation.compare import Answered, accuracy_table, paired_gain, questions_of
from pipeline.evaluation.predictions import PREDICTIONS_FILE, Prediction, accuracy_by_type, by_test_set
from pipeline.evaluation.scores import (
    evaluate_checkpoint,
    held_out_shards,
    predictions_file,
    teacher_predictions,
)

DISTILLED = "student, Align-KD"
BASELINE = "student, labels only"
TEACHER = "teacher"


def run_experiment(config: Config, *, say: Callable[[str], None], overwrite: bool = False) -> str:
    """Do what is not finished below `output_dir` and return the table of results (also in `results.json`).

    A training of other settings is replaced only with `overwrite`. Of several processes all train; only the first
    evaluates and returns the table.
    """
    check_has_student(config)
    output = Path(config.output_dir)
    runs = {DISTILLED: (output / "align_kd", config)}
    if config.baseline:
        runs[BASELINE] = (output / "supervised", labels_only(config))
    # Before the training: wrong paths, settings that transformers refuses, models that would be overwritten.
    if config.evaluate is not None:
        held_out_shards(config.evaluate)
    for folder, settings in runs.values():
        training_arguments(settings, folder)
        check_inputs(settings, folder)
    models: dict[str, list[Prediction]] = {}
    if config.evaluate is not None and (teacher := teacher_predictions(config, say=say)) is not None:
        models[TEACHER] = teacher
    for name, (folder, settings) in runs.items():
        if is_first_process():
            say(f"{name}: {', '.join(settings.losses.active())} -> {folder}")
        train_student(settings, folder, overwrite=overwrite)
    if not is_first_process():
        return ""
    if config.evaluate is not None:
        for name, (folder, settings) in runs.items():
            model = str(folder / MODEL_FOLDER)
            models[name] = evaluate_checkpoint(settings, model, output=folder / PREDICTIONS_FILE)
    if not models:
        return f"student trained: {output / 'align_kd' / 'model'}; no `evaluate` section, so no accuracy was measured"
    return _compare(config, models, output)


def _compare(config: Config, models: dict[str, list[Prediction]], output: Path) -> str:
    assert config.evaluate is not None
    blocks = []
    sets = {name: by_test_set(predictions) for name, predictions in models.items()}
    if TEACHER in sets and questions_of(sets[TEACHER]) != questions_of(sets[DISTILLED]):
        del sets[TEACHER]
        blocks.append(
            f"{predictions_file(config, config.teacher.model)} answers other questions than the students: "
            "the teacher is left out; run `alignkd evaluate` with this config"
        )
    results: dict[str, Any] = {"accuracy": {}, "scores": {}, "gain": {}}
    for test_set in sets[DISTILLED]:
        of_set = {name: predictions[test_set] for name, predictions in sets.items()}
        results["accuracy"][test_set] = {name: accuracy_by_type(p) for name, p in of_set.items()}
        metrics = metrics_for(config.evaluate, of_set[DISTILLED])
        results["scores"][test_set] = _other_scores(of_set, metrics)
        table = accuracy_table(of_set)
        if set(metrics) != {"exact_match"}:
            table += f"\n\n{score_table(of_set, metrics)}"
        blocks.append(table if len(sets[DISTILLED]) == 1 else f"test set {test_set}\n{table}")
        if BASELINE in of_set:
            gain = paired_gain([Answered.of(of_set[DISTILLED])], [Answered.of(of_set[BASELINE])])
            results["gain"][test_set] = asdict(gain)
            blocks.append(
                f"Align-KD against labels only: {gain}\n"
                f"paired bootstrap over {gain.num_images:,} test images with {gain.num_questions:,} questions; "
                "same first weights, same data order, one training seed"
            )
    results["provenance"] = provenance(config)
    replace_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    return "\n\n".join(blocks)


def _other_scores(models: dict[str, list[Prediction]], metrics: Sequence[str]) -> dict[str, Any]:
    """Return model -> question type -> the scores that `alignkd evaluate` shows beside accuracy."""
    return {
        name: {kind: scores.to_json() for kind, scores in scores_by_type(predictions, metrics).items()}
        for name, predictions in models.items()
    }
