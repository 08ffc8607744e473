"""What a report is made of: results, training runs, the store's cost and where all of it comes from. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pipeline.evaluation.compare import Gain, gap_closed

Scores = Mapping[
    str, tuple[float, int]
]  # question type -> (share correct, questions); 'all' is every question


@dataclass(frozen=True)
class Result:
    """One variation on one test set: shares, means over its seeds. What was not measured is None."""

    label: str
    test_set: str
    accuracy: float
    by_seed: tuple[float, ...]
    by_type: dict[str, float]
    num_questions: int
    is_baseline: bool
    gain: Gain | None
    gap_closed: float | None
    gap_by_type: dict[str, float | None]


@dataclass(frozen=True)
class LogLine:
    """What was logged at an optimizer step: `loss/x`, `loss/x_weighted` and, if asked for, `gradient_share/x`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class TrainingRun:
    """One training of a variation. `history` has the log lines with loss terms; None if its folder is gone."""

    label: str
    name: str
    terms: tuple[str, ...]
    reads_teacher: bool
    history: tuple[LogLine, ...] | None
    steps: int | None
    samples_seen: int | None
    train_seconds: float | None
    samples_per_second: float | None
    threads: int | None


@dataclass(frozen=True)
class StoreCost:
    """What the store of the teacher's targets takes, and what an online teacher would have taken instead.

    `samples_seen` are those of the runs that read the teacher, all together.
    """

    bytes: int
    bytes_per_sample: float
    samples: int
    dedupe_factor: float
    array_bytes: dict[str, float]  # a sample, by array
    teacher_seconds: float | None
    num_runs: int
    samples_seen: int | None

    @property
    def online_seconds(self) -> float | None:
        """An estimate: every sample of every run forwarded again, at stage 1's own speed."""
        if self.teacher_seconds is None or self.samples_seen is None or not self.samples:
            return None
        return self.samples_seen * self.teacher_seconds / self.samples

    @property
    def saved_seconds(self) -> float | None:
        """The estimate less what stage 1 took once; below zero while the cache has cost more than it saved."""
        if self.online_seconds is None or self.teacher_seconds is None:
            return None
        return self.online_seconds - self.teacher_seconds


@dataclass(frozen=True)
class Origin:
    """Where numbers come from, as provenance says: time (ISO), commits, commands, versions; empty if none is left."""

    created: str = ""
    commits: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Origin:
        """One provenance; outside a checkout it has no commit."""
        commit = provenance["git_commit"]
        time = datetime.fromisoformat(provenance["created"]).isoformat()
        return cls(time, (commit,) if commit else (), (provenance["command"],), provenance["versions"])


@dataclass(frozen=True)
class Findings:
    """All that a page says. `store_absent` and `teacher_absent` say why there is none, where there is none."""

    kind: Literal["run", "experiment", "sweep"]
    name: str
    config: Mapping[str, Any]
    varied: Mapping[str, Any]
    origin: Origin
    results: tuple[Result, ...]
    teacher: Mapping[str, Scores]  # by test set
    teacher_absent: str
    questions: Mapping[str, Mapping[str, int]]  # test set -> question type -> questions
    runs: tuple[TrainingRun, ...]
    store: StoreCost | None
    store_absent: str

    def test_sets(self) -> list[str]:
        """Their names in the order of the results."""
        return list(dict.fromkeys(result.test_set for result in self.results))

    def labels(self) -> list[str]:
        """The variations in the order of the results, then those that were only trained."""
        return list(dict.fromkeys([r.label for r in self.results] + [run.label for run in self.runs]))


def gaps_closed(
    student: Mapping[str, float], none: Mapping[str, float], teacher: Scores
) -> dict[str, float | None]:
    """`gap_closed` by question type, for the types that all three were asked."""
    return {t: gap_closed(student[t], none[t], teacher[t][0]) for t in student if t in none and t in teacher}
