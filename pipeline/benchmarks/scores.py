"""Scores of a model on benchmarks with bootstrap intervals, their average, and two models compared in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache import digest_of
from pipeline.benchmarks.benchmark import Answered, Benchmark, Counted
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.errors import PipelineError
from pipeline.resampling import resampled_totals

AVERAGED = tuple(row for row in BENCHMARKS.values() if row.in_average)


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Interval:
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(value, float(low), float(high))

    def text(self, *, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{self.value:{sign}.1f} [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class BenchmarkScore:
    """A model's score on one benchmark; `num_all` questions are in its files, of which `num_questions` were asked.

    `resampled` is the headline of every resample of the images; `asked` a digest of the questions.
    """

    benchmark: Benchmark
    measures: dict[str, float]
    resampled: np.ndarray
    asked: str
    num_questions: int
    num_images: int
    num_all: int

    @property
    def headline(self) -> Interval:
        return Interval.of(next(iter(self.measures.values())), self.resampled)

    @property
    def is_sample(self) -> bool:
        return self.num_questions < self.num_all

    @property
    def is_published(self) -> bool:
        """Whether the files hold as many questions as the published split."""
        return self.num_all in self.benchmark.num_questions

    @property
    def lacks(self) -> str:
        """Why the score is not that of the whole published split, empty if it is."""
        if self.is_sample:
            return "a sample"
        return "" if self.is_published else "not the published split"

    def to_json(self) -> dict[str, Any]:
        return {
            **self.headline.to_json(),
            "metric": self.benchmark.metric,
            "measures": self.measures,
            "questions": self.num_questions,
            "images": self.num_images,
            "sample_of": self.num_all if self.is_sample else None,
            "published_questions": list(self.benchmark.num_questions),
        }


def score_of(benchmark: Benchmark, answered: Sequence[Answered], *, num_all: int) -> BenchmarkScore:
    """Return the score of a model's answers. Images are resampled: questions of one image are not independent."""
    counted = benchmark.scorer.count(answered)
    names, rows, strata = _by_image(counted)
    totals = dict(zip(names, rows.sum(axis=0), strict=True))
    seed = list(BENCHMARKS).index(benchmark.name)  # the benchmarks are independent of each other
    drawn = dict(zip(names, resampled_totals(rows, strata, seed=seed).T, strict=True))
    measures = {name: float(value) for name, value in benchmark.scorer.measures(totals).items()}
    return BenchmarkScore(
        benchmark,
        measures,
        benchmark.scorer.measures(drawn)[next(iter(measures))],
        digest_of(sorted(one.question.asked for one in answered)),
        len(answered),
        len(rows),
        num_all,
    )


def _by_image(counted: Sequence[Counted]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names of the counts, the sums 'images counts', and the stratum of each image."""
    sums: dict[tuple[str, str], Counter[str]] = {}
    for one in counted:
        sums.setdefault((one.stratum, one.image_id), Counter()).update(one.counts)
    names = sorted({name for counts in sums.values() for name in counts})
    images = sorted(sums)
    rows = np.array([[sums[image][name] for name in names] for image in images], dtype=float)
    return names, rows, np.array([stratum for stratum, _ in images])


@dataclass(frozen=True)
class SuiteScores:
    """A model's scores, by benchmark."""

    model: str
    scores: Mapping[str, BenchmarkScore]

    @property
    def missing(self) -> list[str]:
        """What keeps the average from being the paper's: benchmarks that are absent, or not asked as published."""
        absent = [row.title for row in AVERAGED if row.name not in self.scores]
        there = [self.scores[row.name] for row in AVERAGED if row.name in self.scores]
        return absent + [f"{score.benchmark.title} ({score.lacks})" for score in there if score.lacks]

    @property
    def average(self) -> Interval | None:
        """The mean of all six benchmarks, with MME / 20; None unless all are whole published splits."""
        if self.missing:
            return None
        return Interval.of(self._mean(lambda s: s.headline.value), self._resampled)

    @property
    def _resampled(self) -> np.ndarray:
        return np.asarray(self._mean(lambda score: score.resampled))

    def _mean(self, part: Any) -> Any:
        return sum(part(self.scores[row.name]) / row.average_divisor for row in AVERAGED) / len(AVERAGED)


def differences(ours: SuiteScores, theirs: SuiteScores) -> dict[str, Interval]:
    """Return ours minus theirs with paired intervals, by benchmark, and of the average if both have one.

    Raises `PipelineError` if they answered different questions.
    """
    made: dict[str, Interval] = {}
    for name, score in ours.scores.items():
        other = theirs.scores[name]
        if score.asked != other.asked:
            raise PipelineError(
                f"{name}: the two models answered different questions; use the same data for both"
            )
        value = score.headline.value - other.headline.value
        made[name] = Interval.of(value, score.resampled - other.resampled)
    if ours.average and theirs.average:
        value = ours.average.value - theirs.average.value
        made["average"] = Interval.of(value, ours._resampled - theirs._resampled)
    return made
