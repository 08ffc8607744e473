"""`verify --fix`: what is damaged or missing in a store is captured again from its shards, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache import Report, StoreWriter, local, restore_manifest, verify
from pipeline.config.config import Config
from pipeline.data.shards import part_name
from pipeline.errors import ConfigError
from pipeline.teacher_cache.teacher import plan_capture, write_parts


@dataclass(frozen=True)
class Repair:
    """What was done, and what `verify --deep` finds after it."""

    manifest_restored: bool
    recaptured: tuple[str, ...]  # damaged parts
    captured: tuple[str, ...]  # missing parts
    broken: tuple[str, ...]  # why the others could not be captured
    report: Report


def repair_store(
    config: Config, report: Report, *, say: Callable[[str], None], may_hold_fewer: bool = False
) -> Repair:
    """Capture again the parts that a deep report finds damaged, and capture those that are missing.

    A damaged part stays until the new one is whole, and for good if the new one would hold fewer samples, unless
    `may_hold_fewer`. Files that the format does not know, and files that the system refuses to read, are left alone.
    Raises, before anything is written, `FingerprintMismatch` if the config would write other values, and
    `ConfigError` if it does not name the shard of a part.
    """
    store = local(report.path, doing="repaired")
    if store.resolve() != Path(config.one_cache.path).resolve():
        raise ConfigError(
            f"--fix: the config's cache.path is {config.one_cache.path}, not {store}; give the config that the store "
            "was made with, or cache.path=... after it"
        )
    plan = plan_capture(config)
    if manifest_restored := restore_manifest(store, plan.manifest):
        say(f"{store}/manifest.json was lost or damaged; it is written again from the config")
        report = verify(store, deep=True)  # which parts there should be is only known now
    missing = [problem.part for problem in report.problems if problem.kind == "missing part"]
    damaged = [name for name in report.damaged_parts if name not in missing]
    todo = tuple(_shard_of(name, plan.shards) for name in (*damaged, *missing))
    # The store's own plan stays: what else the config may name is not captured here.
    manifest = replace(plan.manifest, planned_parts=tuple(part_name(shard) for shard in todo))
    StoreWriter.open(store, manifest)  # compares fingerprints, and puts lost group files back
    plan = replace(plan, shards=todo, manifest=manifest)
    broken = write_parts(plan, recapture=damaged, may_hold_fewer=may_hold_fewer).broken
    after = verify(store, deep=True)
    left = {
        *after.damaged_parts,
        *(problem.part for problem in after.problems if problem.kind == "missing part"),
    }
    mended = [tuple(name for name in names if name not in left) for names in (damaged, missing)]
    return Repair(manifest_restored, mended[0], mended[1], broken, after)


def _shard_of(part: str, shards: Sequence[str]) -> str:
    for shard in shards:
        if part_name(shard) == part:
            return shard
    raise ConfigError(
        f"--fix: part {part} is to be captured again, but data.shards names no shard {part}.tar; add it"
    )
