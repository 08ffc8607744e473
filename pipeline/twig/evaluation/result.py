"""What was measured of twigs: accuracy kept and speed, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.config.provenance import replace_text
from pipeline.errors import PipelineError
from pipeline.ratios import Ratios

FOLDER, RESULT, PICTURE = "twig_evaluation", "evaluation.json", "kept.png"  # below output_dir


@dataclass(frozen=True)
class Interval:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class KeptRow:
    """The score of a selector at a share of vision tokens, of the questions of a test set of one `kind`.

    `kind` is a question type, or `short` or `long` for all types of such answers; `keep` a fraction such as 1/9.
    `score` and `whole` are the mean scores with and without pruning, `kept` their ratio, None where `whole` is 0.
    `by_twig` has the ratio of each twig, `beside_twig` is the ratio less the twig's own.
    """

    test_set: str
    kind: str
    selector: str
    keep: str
    questions: int
    images: int
    score: float
    whole: float
    kept: Interval | None
    by_twig: list[float] = field(default_factory=list)
    beside_twig: Interval | None = None

    @property
    def share(self) -> float:
        return float(Fraction(self.keep))


@dataclass(frozen=True)
class SpeedRow:
    """A way to answer the questions of one `kind`, `short` or `long`: medians over turns, and what it computes.

    `acceptance` are accepted over drafted tokens, `tokens_a_pass` tokens a verification, `seconds` an answer's. The
    ratios are to the base without a twig in the same turn; that of the time is the base's over this way's.
    `operations` are multiply-adds an answer, None where they are not counted. `same` is the share of answers that
    equal those of the same pruning without drafts.
    """

    kind: str
    way: str
    answers: int
    acceptance: float | None
    tokens_a_pass: float | None
    tokens_a_second: float
    seconds: float
    tokens_ratio: Ratios | None
    time_ratio: Ratios | None
    operations: float | None
    operations_ratio: float | None
    same: float | None


@dataclass(frozen=True)
class Evaluation:
    """All rows, and what they were measured with. `twigs` are digests of their tensors."""

    kept: list[KeptRow]
    speed: list[SpeedRow]
    base: str
    base_digest: str
    twigs: list[str]
    geometry: Mapping[str, int]
    types: Mapping[str, str]  # question type -> metric
    max_new_tokens: int
    dtype: str
    turns: int
    threads: int
    machine: str
    notes: list[str]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the result as JSON into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / RESULT, json.dumps(asdict(self), indent=1) + "\n")
        return folder / RESULT

    @classmethod
    def read(cls, file: Path) -> Evaluation:
        """Read what `write` wrote. Raises `PipelineError` if the file is damaged."""
        try:
            made: dict[str, Any] = json.loads(file.read_text())
            kept = [_kept_row(row) for row in made.pop("kept")]
            speed = [_speed_row(row) for row in made.pop("speed")]
            return cls(kept, speed, **made)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PipelineError(f"{file} is damaged; run `alignkd twig evaluate` again") from error

    def test_sets(self) -> list[str]:
        """Return the test sets in their order."""
        return list(dict.fromkeys(row.test_set for row in self.kept))

    def selectors(self) -> list[str]:
        """Return the selectors in their order."""
        return list(dict.fromkeys(row.selector for row in self.kept))

    def kinds(self, test_set: str) -> list[str]:
        """Return `short`, `long` and the question types of a test set."""
        return list(dict.fromkeys(row.kind for row in self.kept if row.test_set == test_set))

    def rows(self, test_set: str, kind: str, selector: str) -> list[KeptRow]:
        """Return a selector's rows, one for each share."""
        asked = (test_set, kind, selector)
        return [row for row in self.kept if (row.test_set, row.kind, row.selector) == asked]


def _kept_row(made: dict[str, Any]) -> KeptRow:
    for name in ("kept", "beside_twig"):
        made[name] = Interval(**made[name]) if made[name] else None
    return KeptRow(**made)


def _speed_row(made: dict[str, Any]) -> SpeedRow:
    for name in ("tokens_ratio", "time_ratio"):
        made[name] = Ratios(**made[name]) if made[name] else None
    return SpeedRow(**made)
