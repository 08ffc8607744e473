"""Models side by side: accuracy by question type, and a paired bootstrap interval of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import PipelineError
from pipeline.evaluate import Prediction, accuracy_by_type

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Gain:
    """Accuracy of one model minus another's on the same questions, with a 95% interval; shares, not percent."""

    difference: float
    low: float
    high: float
    num_questions: int
    num_images: int

    def __str__(self) -> str:
        return f"{100 * self.difference:+.2f} points, 95% interval [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def paired_gain(ours: Sequence[Prediction], theirs: Sequence[Prediction], *, seed: int = 0) -> Gain:
    """Bootstrap over images, since questions of one image are not independent. Raises if the questions differ."""
    if [p.key for p in ours] != [p.key for p in theirs]:
        raise PipelineError("the two models answered different questions; evaluate both on the same shards")
    groups, of_question = np.unique([p.group for p in ours], return_inverse=True)
    gains = np.array([p.correct - q.correct for p, q in zip(ours, theirs, strict=True)], dtype=np.float64)
    sums = np.bincount(of_question, weights=gains)
    sizes = np.bincount(of_question)
    low, high = np.quantile(_resampled_means(sums, sizes, seed=seed), [0.025, 0.975])
    return Gain(float(gains.mean()), float(low), float(high), len(gains), len(groups))


def _resampled_means(sums: np.ndarray, sizes: np.ndarray, *, seed: int) -> np.ndarray:
    """The mean gain of every resample of the images, one resample in memory at a time."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(sums), size=len(sums)) for _ in range(NUM_RESAMPLES))
    return np.array([sums[draw].sum() / sizes[draw].sum() for draw in draws])


def accuracy_table(models: Mapping[str, Sequence[Prediction]]) -> str:
    """Accuracy in percent, a row a model, a column a question type, the number of questions below the names."""
    scores = {name: accuracy_by_type(predictions) for name, predictions in models.items()}
    types = list(next(iter(scores.values())))
    first = next(iter(scores.values()))
    rows = [["accuracy, %", *types], ["questions", *(str(first[t][1]) for t in types)]]
    rows += [[name, *(f"{100 * score[t][0]:.2f}" for t in types)] for name, score in scores.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(types) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])
