"""`verify --fix`: capture what is damaged or missing in a store again from its shards, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cache import Report, StoreWriter, local, restore_manifest, verify
from pipeline.config.config import Config
from pipeline.data.shard_kinds import part_name
from pipeline.errors import ConfigError
from pipeline.teacher_cache.teacher import plan_capture, write_parts


@dataclass(frozen=True)
class Repair:
    """The parts that were captured, and the report of `verify --deep` afterwards."""

    recaptured: tuple[str, ...]  # damaged parts
    captured: tuple[str, ...]  # missing parts
    broken: tuple[str, ...]  # why the others could not be captured
    report: Report


def repair_store(
    config: Config, report: Report, *, say: Callable[[str], None], may_hold_fewer: bool = False
) -> Repair:
    """Capture the damaged parts of a deep report again, and the missing ones.

    A damaged part stays until the new one is whole. It is kept if the new one would hold fewer samples, unless
    `may_hold_fewer`. Files that the format does not know or the system cannot read are left alone. Raises, before
    anything is written, `FingerprintMismatch` if the config would write other values, `ConfigError` if it does not
    name the shard of a part.
    """
    store = local(report.path, doing="repaired")
    if store.resolve() != Path(config.one_cache.path).resolve():
        raise ConfigError(
            f"--fix: the config's cache.path is {config.one_cache.path}, not {store}; give the config that the store "
            "was made with, or cache.path=... after it"
        )
    plan = plan_capture(config)
    if restore_manifest(store, plan.manifest):
        say(f"{store}/manifest.json was lost or damaged; it is written again from the config")
        report = verify(store, deep=True)  # without a manifest it did not know which parts to expect
    missing = _missing(report)
    damaged = [name for name in report.damaged_parts if name not in missing]
    shards = {part_name(shard): shard for shard in plan.shards}
    todo = [*damaged, *missing]
    if unknown := [part for part in todo if part not in shards]:
        part = unknown[0]
        raise ConfigError(
            f"--fix: part {part} is to be captured again, but data.shards names no shard {part}.tar; add it"
        )
    # Only these parts are planned: other shards that the config may name are not captured here.
    manifest = replace(plan.manifest, planned_parts=tuple(todo))
    StoreWriter.open(store, manifest)  # compares fingerprints and restores lost group files
    plan = replace(plan, shards=tuple(shards[part] for part in todo), manifest=manifest)
    broken = write_parts(plan, recapture=damaged, may_hold_fewer=may_hold_fewer).broken
    after = verify(store, deep=True)
    left = {*after.damaged_parts, *_missing(after)}
    recaptured, captured = (tuple(name for name in names if name not in left) for names in (damaged, missing))
    return Repair(recaptured, captured, broken, after)


def _missing(report: Report) -> list[str]:
    return [problem.part for problem in report.problems if problem.kind == "missing part"]
