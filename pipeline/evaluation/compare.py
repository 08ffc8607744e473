"""Compare models: accuracy by question type, and a paired bootstrap interval of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cache import digest_of
from pipeline.errors import PipelineError
from pipeline.evaluation.predictions import NO_TYPE, Prediction, accuracy_by_type
from pipeline.resampling import resampled_means
from pipeline.text_table import text_table

MIN_GAP = 0.005  # half a point between teacher and labels only: a share of less than that is noise


@dataclass(frozen=True)
class Gain:
    """Accuracy of one model minus another's on the same questions, with a 95% interval; shares, not percent.

    `num_seeds` pairs of training runs, each pair from the same seed.
    """

    difference: float
    low: float
    high: float
    num_questions: int
    num_images: int
    num_seeds: int = 1

    def __str__(self) -> str:
        return f"{100 * self.difference:+.2f} points, 95% interval [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


@dataclass(frozen=True)
class Answered:
    """Which questions of a test set a model answered correctly: `correct` bool 'questions'.

    `groups` int 'questions' is the number of a question's image; `questions` a digest of what was asked, in order.
    """

    questions: str
    groups: np.ndarray
    correct: np.ndarray

    @classmethod
    def of(cls, predictions: Sequence[Prediction]) -> Answered:
        asked = [[p.test_set, p.key, p.answer, p.group] for p in predictions]
        groups = np.unique([p.group for p in predictions], return_inverse=True)[1]
        correct = np.array([p.correct for p in predictions], dtype=bool)
        return cls(digest_of(asked), groups, correct)


def questions_of(sets: Mapping[str, Sequence[Prediction]]) -> dict[str, str]:
    """Return test set -> digest of what was asked: equal where two models answered the same questions."""
    return {test_set: Answered.of(predictions).questions for test_set, predictions in sets.items()}


def paired_gain(ours: Sequence[Answered], theirs: Sequence[Answered], *, seed: int = 0) -> Gain:
    """Return the gain over paired runs, one pair for each training seed, with its bootstrap interval.

    Images are resampled, since questions of one image are not independent. Students of other seeds would differ, too,
    and a bootstrap over a few seeds gives too narrow an interval. Therefore the mean over n seeds is drawn from
    Student's t with n - 1 degrees of freedom. Raises `PipelineError` if the questions differ.
    """
    if len({run.questions for run in (*ours, *theirs)}) > 1:
        raise PipelineError("the two models answered different questions; evaluate both on the same shards")
    groups = ours[0].groups
    gains = np.stack([a.correct.astype(float) - b.correct for a, b in zip(ours, theirs, strict=True)])
    sums = np.stack([np.bincount(groups, weights=run) for run in gains])
    sizes = np.bincount(groups)
    low, high = np.quantile(resampled_means(sums, sizes, seed=seed), [0.025, 0.975])
    return Gain(float(gains.mean()), float(low), float(high), gains.shape[1], len(sizes), len(gains))


def gap_closed(student: float, none: float, teacher: float) -> float | None:
    """Return (student - none) / (teacher - none); None where the teacher leads by less than `MIN_GAP`.

    `none` is the accuracy of labels only; all three are shares.
    """
    gap = teacher - none
    return (student - none) / gap if round(gap, 9) >= MIN_GAP else None


def accuracy_table(models: Mapping[str, Sequence[Prediction]]) -> str:
    """Return accuracies in percent: a row for each model, a column for each question type, counts below the names.

    Where no question has a type of its own there is one column.
    """
    scores = {name: accuracy_by_type(predictions) for name, predictions in models.items()}
    first = dict(next(iter(scores.values())))
    if set(first) == {NO_TYPE, "all"}:
        del first[NO_TYPE]
    rows = [["accuracy, %", *first], ["questions", *(str(number) for _, number in first.values())]]
    rows += [[name, *(f"{100 * score[t][0]:.2f}" for t in first)] for name, score in scores.items()]
    return text_table(rows, num_heads=2)
