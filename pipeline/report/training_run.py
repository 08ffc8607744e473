"""One training of a variation, as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.losses.losses import LOSSES


@dataclass(frozen=True)
class TrainingRun:
    """One training of a variation.

    `history` holds, for each logged step, `step`, `loss/x`, `loss/x_weighted` and perhaps `gradient_share/x`, and
    for each step at which held-out samples were looked at, `held_out/x`. What is observed beside a term x is
    `observed/x/y`, and held out `held_out/x/y`. It is None if the run's folder is gone.
    """

    label: str
    name: str
    terms: tuple[str, ...]
    history: Sequence[Mapping[str, float]] | None
    steps: int | None
    samples_seen: int | None
    train_seconds: float | None
    samples_per_second: float | None
    threads: int | None

    @classmethod
    def of(cls, line: Mapping[str, Any], history: Sequence[Mapping[str, float]] | None) -> TrainingRun:
        """Read a sweep's line, with its label; terms are put in the order of LOSSES, unknown ones last."""
        order = {name: place for place, name in enumerate(LOSSES)}
        terms = tuple(sorted(line["terms"], key=lambda name: (order.get(name, len(order)), name)))
        costs = ("steps", "samples_seen", "train_seconds", "samples_per_second", "threads")
        return cls(line["label"], line["name"], terms, history, *(line[name] for name in costs))

    @property
    def reads_teacher(self) -> bool:
        """Whether the run would need the teacher if there were no store: one of labels only does not."""
        return any(LOSSES[name].targets for name in self.terms if name in LOSSES)
