"""The contents of a report: results, training runs and their origin. Numbers only, from rows and lines of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pipeline.evaluation.compare import Gain, gap_closed
from pipeline.phone.result import BenchResult
from pipeline.report.cost import StoreCost
from pipeline.report.training_run import TrainingRun
from pipeline.twig.evaluation.result import Evaluation

Scores = Mapping[str, tuple[float, int]]  # question type -> (share correct, questions), 'all' among them


@dataclass(frozen=True)
class Result:
    """One variation on one test set: shares, means over its seeds. What was not measured is None."""

    label: str
    test_set: str
    accuracy: float
    by_seed: Sequence[float]
    by_type: Mapping[str, float]
    num_questions: int
    is_baseline: bool
    gain: Gain | None
    gap_closed: float | None
    gap_by_type: Mapping[str, float | None]

    @classmethod
    def of(cls, row: Mapping[str, Any], *, baselines: Sequence[str], teacher: Scores | None) -> Result:
        """Read a summary's row; `baselines` are the labels of labels-only variations.

        No gap is closed where teacher and student were asked different questions.
        """
        by_type, none = dict(row["by_type"]), row["baseline_by_type"]
        is_baseline = row["gain"] is None and row["label"] in baselines
        gaps: dict[str, float | None] = {}
        if none and not is_baseline and teacher and teacher["all"][1] == row["questions"]:
            shares = by_type | {"all": row["accuracy"]}
            types = [t for t in shares if t in none and t in teacher]
            gaps = {t: gap_closed(shares[t], none[t], teacher[t][0]) for t in types}
        is_wide = gaps.pop("all", None) is not None
        by_type.pop("all", None)
        return cls(
            label=row["label"],
            test_set=row["test_set"],
            accuracy=row["accuracy"],
            by_seed=tuple(row["accuracy_by_seed"]),
            by_type=by_type,
            num_questions=row["questions"],
            is_baseline=is_baseline,
            gain=Gain(**row["gain"]) if row["gain"] else None,
            gap_closed=row["gap_closed"] if is_wide else None,
            gap_by_type=gaps,
        )


@dataclass(frozen=True)
class Origin:
    """Where numbers come from: time (ISO), commits, commands, versions; empty where no provenance is left."""

    created: str = ""
    commits: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, provenances: Sequence[Mapping[str, Any]]) -> Origin:
        """Return the latest time and its versions, and every commit and command once, oldest first."""
        if not provenances:
            return cls()
        made = sorted(provenances, key=lambda provenance: datetime.fromisoformat(provenance["created"]))
        commits, commands = (dict.fromkeys(p[name] for p in made) for name in ("git_commit", "command"))
        found = tuple(commit for commit in commits if commit)  # '' outside a checkout
        return cls(made[-1]["created"], found, tuple(commands), made[-1]["versions"])


@dataclass(frozen=True)
class Findings:
    """All contents of a page. `store_absent` and `teacher_absent` give the reason where there is none."""

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
    phone: BenchResult | None = None
    twig: Evaluation | None = None
    twig_picture: bytes = b""  # PNG; empty if none was drawn

    def test_sets(self) -> list[str]:
        """Return the test sets in the order of the results."""
        return list(dict.fromkeys(result.test_set for result in self.results))

    def labels(self) -> list[str]:
        """Return the variations in the order of the results, then those that were only trained."""
        return list(dict.fromkeys([r.label for r in self.results] + [run.label for run in self.runs]))
