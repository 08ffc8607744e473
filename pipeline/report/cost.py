"""What the store of the teacher's targets cost, beside what an online teacher would have cost the same runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cache import CacheError, summarise
from pipeline.report.findings import StoreCost, TrainingRun


def cost_of_store(
    config: Mapping[str, Any], runs: Sequence[TrainingRun], *, varied: Mapping[str, Any]
) -> tuple[StoreCost | None, str]:
    """Its cost, or None and the reason why it is not known; labels-only runs count as needing no teacher."""
    if "cache.path" in varied:
        return None, "The runs read different stores (cache.path was varied), so no one store is their cost."
    if config.get("caches"):
        return None, "The runs read several stores (caches), so no one store is their cost."
    try:
        store = summarise(config["cache"]["path"])
    except CacheError as error:
        return None, f"The store cannot be read now: {error}"
    readers = [run for run in runs if run.reads_teacher]
    seen = [run.samples_seen for run in readers if run.samples_seen is not None]
    cost = StoreCost(
        bytes=store.bytes,
        bytes_per_sample=store.bytes_per_sample,
        samples=store.samples,
        dedupe_factor=store.dedupe_factor,
        array_bytes={array.name: array.bytes_per_sample for array in store.arrays},
        teacher_seconds=store.teacher_seconds,
        num_runs=len(readers),
        samples_seen=sum(seen) if readers and len(seen) == len(readers) else None,
    )
    return cost, ""
