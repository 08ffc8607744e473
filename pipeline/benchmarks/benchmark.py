"""What a benchmark is: questions about images, a prompt, and a scorer by the benchmark's own rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cache import digest_of

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."

Totals = Mapping[str, np.ndarray]


class ImagePlace(Protocol):
    """Where an image lies; it is read when the question is asked."""

    def read(self) -> bytes:
        """Return the bytes of the image file."""
        ...


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """One question about one image.

    `text` is what is asked, without the image's placeholder. Questions of one `unit` are scored together: MMBench's
    rotations, MME's pair. `image_id` is shared by the questions of one image (bootstrap). `group` is POPE's split or
    MME's sub-task.
    """

    id: str
    text: str
    image: ImagePlace = field(compare=False)
    image_id: str
    reference: str | tuple[str, ...]
    unit: str = ""
    group: str = ""
    options: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """The digest of what is asked and of what is right."""
        return digest_of([self.text, self.image_id, self.reference, self.group, self.options])


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and a model's answer, without space around it."""

    question: BenchmarkQuestion
    answer: str


@dataclass(frozen=True, slots=True)
class Counted:
    """What one unit adds to the score. Images of one `stratum` are resampled among themselves."""

    image_id: str
    counts: Mapping[str, float]
    stratum: str = ""


class Scorer(Protocol):
    """The rules of a benchmark: answers to counts, and sums of counts to measures."""

    def count(self, answered: Sequence[Answered]) -> list[Counted]:
        """Return the counts of every unit."""
        ...

    def measures(self, totals: Totals) -> dict[str, np.ndarray]:
        """Return each measure of sums of counts, the headline first; arrays hold one sum a resample."""
        ...


@dataclass(frozen=True)
class MeanScore:
    """The mean score of all questions, in percent."""

    score: Callable[[Answered], float]

    def count(self, answered: Sequence[Answered]) -> list[Counted]:
        return [Counted(a.question.image_id, {"score": self.score(a), "questions": 1}) for a in answered]

    def measures(self, totals: Totals) -> dict[str, np.ndarray]:
        return {"accuracy": 100 * ratio(totals["score"], totals["questions"])}


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where the whole is 0."""
    part, whole = np.asarray(part, dtype=float), np.asarray(whole, dtype=float)
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole != 0)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the suite.

    `version` changes with the prompt or the reader: answers of another version are not continued. `num_questions` are
    those of the published split, of each form in which it is published. `crops` is the original's image preprocessing
    for ScienceQA: MobileVLM V2 does not pad these images. `in_average` is false for a variant of another benchmark.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    split: str
    licence: str
    source: str
    prompt: str
    metric: str
    max_new_tokens: int
    num_questions: tuple[int, ...]
    read: Callable[[Path], list[BenchmarkQuestion]]
    scorer: Scorer
    version: int = 1
    crops: bool = False
    in_average: bool = True
    average_divisor: float = 1.0

    def folder(self, data: Path) -> Path | None:
        """Return the benchmark's folder below `data`, None if there is none."""
        return next((data / name for name in self.folders if (data / name).is_dir()), None)

    def prompt_settings(self) -> dict[str, Any]:
        """Return what answers depend on, beside the question itself."""
        return {"benchmark": self.name, "version": self.version, "max_new_tokens": self.max_new_tokens}
