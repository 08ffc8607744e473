"""A model's answers to the questions of test sets, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import PipelineError

PREDICTIONS_FILE = "predictions.jsonl"
NO_TYPE = "all questions"  # the type of questions that have none


@dataclass(frozen=True)
class Prediction:
    """The answer to one question of a test set; `group` is shared by the questions of one image (bootstrap).

    `log_prob` is that of the reference `answer`, summed over its `num_tokens`, the end mark included; None with 0
    tokens where the template cannot express it. `num_tokens` is None in files of earlier versions.
    """

    key: str
    group: str
    question_type: str
    answer: str
    prediction: str
    test_set: str = "test"
    # In another batch they are rounded otherwise.
    log_prob: float | None = field(default=None, compare=False)
    num_tokens: int | None = None

    @property
    def is_scored(self) -> bool:
        return self.num_tokens is not None

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.prediction.strip()


def read_predictions(file: Path) -> list[Prediction]:
    """Read what `evaluate_model` wrote. Raises `PipelineError` naming the file if it is anything else."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [Prediction(**{k: v for k, v in row.items() if k != "correct"}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{file} is damaged: not every line is a prediction; remove it and evaluate again"
        ) from error


def by_test_set(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Return the predictions of each test set, in their order."""
    sets: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        sets.setdefault(prediction.test_set, []).append(prediction)
    return sets


def accuracy_by_type(predictions: Sequence[Prediction]) -> dict[str, tuple[float, int]]:
    """Return question type -> (share correct, questions), types by name, 'all' last."""
    types = sorted({p.question_type for p in predictions})
    groups = {t: [p.correct for p in predictions if p.question_type == t] for t in types}
    groups["all"] = [p.correct for p in predictions]
    return {name: (sum(correct) / len(correct), len(correct)) for name, correct in groups.items()}
