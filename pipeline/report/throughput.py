"""Training speed of the students: one line for each variation, over its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.report.findings import TrainingRun


@dataclass(frozen=True)
class Throughput:
    """Means over a variation's runs, of training without the evaluation; None where a run lacks a number."""

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
    """Return the throughput of the runs of one variation."""
    own = [run for run in runs if run.label == label]
    names = ("steps", "samples_seen", "train_seconds", "samples_per_second")
    columns = {name: [getattr(run, name) for run in own] for name in names}
    # No mean over some of the runs: it would be read as one over all.
    means = {name: fmean(column) if None not in column else None for name, column in columns.items()}
    speeds = [speed for speed in columns["samples_per_second"] if speed is not None]
    threads = ", ".join(map(str, sorted({run.threads for run in own if run.threads is not None})))
    slowest, fastest = min(speeds, default=None), max(speeds, default=None)
    return Throughput(label, len(own), **means, slowest=slowest, fastest=fastest, threads=threads or "-")
