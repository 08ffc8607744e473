"""The cost of training: speed of the students, and the store compared with an online teacher for the same runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cache import CacheError, Summary, summarise
from pipeline.report.training_run import TrainingRun


@dataclass(frozen=True)
class StoreCost:
    """A store and the runs that read its teacher: how many, and the samples that they saw, all together."""

    store: Summary
    num_runs: int
    samples_seen: int | None

    @property
    def online_seconds(self) -> float | None:
        """An estimate: the teacher's forward of every sample of every run, at stage 1's speed."""
        if self.store.teacher_seconds is None or self.samples_seen is None or not self.store.samples:
            return None
        return self.samples_seen * self.store.teacher_seconds / self.store.samples

    @property
    def saved_seconds(self) -> float | None:
        """The estimate minus the time of stage 1; negative while the cache has cost more than it saved."""
        if self.online_seconds is None or self.store.teacher_seconds is None:
            return None
        return self.online_seconds - self.store.teacher_seconds

    @property
    def why_not_saved(self) -> str:
        """The number that the estimate lacks."""
        if self.num_runs == 0:
            return "No run here reads the teacher."
        if self.store.teacher_seconds is None:
            return "Not known: the store does not say how long the teacher took."
        return "Not known: not every run says how many samples it saw."


def cost_of_store(
    config: Mapping[str, Any], runs: Sequence[TrainingRun], *, varied: Mapping[str, Any]
) -> tuple[StoreCost | None, str]:
    """Return the store's cost, or None and why it is not known. Labels-only runs need no teacher and do not count."""
    if "cache.path" in varied:
        return None, "The runs read different stores (cache.path was varied), so no one store is their cost."
    if config.get("caches"):
        return None, "The runs read several stores (caches), so no one store is their cost."
    try:
        store = summarise(config["cache"]["path"])
    except CacheError as error:
        return None, f"The store cannot be read now: {error}"
    seen = [run.samples_seen for run in runs if run.reads_teacher]
    known = [samples for samples in seen if samples is not None]
    return StoreCost(store, len(seen), sum(known) if known and len(known) == len(seen) else None), ""


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
