"""How fast students trained: one line for each variation, over its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.findings import TrainingRun


@dataclass(frozen=True)
class Throughput:
    """Means over a variation's runs; None where a run does not say. Training alone, without the evaluation."""

    label: str
    num_runs: int
    steps: float | None
    samples_seen: float | None
    train_seconds: float | None
    samples_per_second: float | None
    slowest: float | None
    fastest: float | None
    threads: str


def throughput_of(label: str, runs: Sequence[TrainingRun]) -> Throughput:
    """Of the runs of one variation."""
    own = [run for run in runs if run.label == label]
    speeds = [run.samples_per_second for run in own if run.samples_per_second is not None]
    threads = sorted({run.threads for run in own if run.threads is not None})
    return Throughput(
        label=label,
        num_runs=len(own),
        steps=_mean([run.steps for run in own]),
        samples_seen=_mean([run.samples_seen for run in own]),
        train_seconds=_mean([run.train_seconds for run in own]),
        samples_per_second=_mean([run.samples_per_second for run in own]),
        slowest=min(speeds, default=None),
        fastest=max(speeds, default=None),
        threads=", ".join(map(str, threads)) or "-",
    )


def _mean(numbers: Sequence[float | None]) -> float | None:
    """None if any is not known: a mean over some of the runs would pass for one over all."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
