"""Stage 1: shards -> teacher -> store. One tar shard in, one immutable part out; every sample cached or rejected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import torch

from cache import (
    FORMAT_VERSION,
    ArraySpec,
    Fingerprint,
    Manifest,
    PartSummary,
    Store,
    StoreWriter,
    digest_of,
)
from pipeline.capture import Capture, Captured
from pipeline.config import Config
from pipeline.errors import ConfigError, ShardError
from pipeline.inputs import Preparation, capture_settings
from pipeline.models.stub import TeacherPlan, load_teacher, plan_teacher
from pipeline.overlap import Behind
from pipeline.progress import Progress
from pipeline.provenance import provenance
from pipeline.shards import expand_shards, part_name
from pipeline.targets import TARGETS
from pipeline.workers import ALONE, Worker, shards_to_write

TOKEN_ARRAYS = (
    ArraySpec("input_ids", "S", (), "sample", "integer", {"dtype": "int32"}),
    ArraySpec("labels", "S", (), "sample", "integer", {"dtype": "int32"}),
)


@dataclass(frozen=True)
class CacheSummary:
    """What a run of stage 1 did: parts written now and found done, and the samples of those written now.

    `broken` says of each shard that could not be read what is wrong with it; it has no part.
    """

    path: str
    parts_written: int
    parts_found: int
    seen: int
    cached: int
    rejected: int
    bytes_written: int
    broken: tuple[str, ...]


def cache_teacher(config: Config, worker: Worker = ALONE) -> CacheSummary:
    """Write every part of the store that is not there yet; the teacher is loaded only if one is missing.

    Several workers may write one store: each begins with its share of the shards, and takes over what others left.
    A shard that cannot be read is left out and told in the summary; the others are cached all the same.
    Raises `FingerprintMismatch` if the store holds something else, before anything is written.
    """
    return write_parts(plan_capture(config), worker)


@dataclass(frozen=True)
class CapturePlan:
    """Stage 1 as a config asks for it, before a weight is loaded or a file written."""

    config: Config
    shards: tuple[str, ...]
    preparation: Preparation
    teacher: TeacherPlan
    dtype: torch.dtype
    device: torch.device
    manifest: Manifest


def plan_capture(config: Config) -> CapturePlan:
    """Finds the shards, hashes tokenizer and teacher, and says what the store will hold."""
    _ = config.one_cache  # several are no place to write to: told before the teacher is read
    shards = tuple(expand_shards(config.data.shards))
    preparation = Preparation.of(config.teacher.model, config.data)
    plan = plan_teacher(
        config.teacher.model, targets=config.targets.cached(), vouching_for=config.targets.active()
    )
    dtype, device = _compute_dtype(config, plan), _device(config.teacher.device)
    parts = [part_name(shard) for shard in shards]
    manifest = build_manifest(config, plan, preparation, dtype=dtype, parts=parts)
    return CapturePlan(config, shards, preparation, plan, dtype, device, manifest)


def write_parts(plan: CapturePlan, worker: Worker = ALONE) -> CacheSummary:
    """Capture the shards of the plan that have no part yet."""
    config, shards = plan.config, plan.shards
    store = StoreWriter.open(config.one_cache.path, plan.manifest)
    todo = [shard for shard in shards if not store.is_done(part_name(shard))]
    summaries: list[PartSummary] = []
    broken: list[str] = []
    if todo:
        cached = _keys_of_finished_parts(config.one_cache.path)
        teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=_usable(plan.device))
        # A part is compressed and written while the teacher is at work on the next shard.
        with Progress(todo, description="teacher-cache") as progress, Behind(limit=1) as writing:
            capture = Capture(config, teacher, plan.preparation, progress, cached)
            for shard, lease in shards_to_write(store, shards, worker, say=progress.say):
                with lease:  # it ends here, unless there is a part to write
                    try:
                        captured = capture.run(store, shard)
                    except ShardError as error:
                        if config.data.on_bad_sample == "fail":
                            raise
                        broken.append(str(error))
                    else:
                        writing.do(partial(_write, captured, lease.pop_all(), summaries, progress))
    if worker.world_size > 1:
        len(
            Store(config.one_cache.path)
        )  # workers do not see each other's keys: one that occurs twice is told here
    return _summary(config, summaries, parts_found=len(shards) - len(todo), broken=broken)


def _write(captured: Captured, lease: ExitStack, summaries: list[PartSummary], progress: Progress) -> None:
    with lease:
        summaries.append(captured.commit())
        progress.end_shard(summaries[-1])


def build_manifest(
    config: Config, plan: TeacherPlan, preparation: Preparation, *, dtype: torch.dtype, parts: Sequence[str]
) -> Manifest:
    """What the store will say of itself, before anything is captured."""
    capture = capture_settings(config, dtype=str(dtype).removeprefix("torch."))
    arrays = [
        array
        for name, settings in config.targets.cached().items()
        for array in TARGETS[name].arrays(settings, plan.facts)
    ]
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=Fingerprint(teacher=plan.digest, capture=digest_of(capture), **preparation.digests()),
        arrays=(*TOKEN_ARRAYS, *arrays),
        teacher=asdict(plan.facts)
        | {"num_tensors_used": len(plan.tensors), "is_stub": plan.is_stub, "digests": plan.digests},
        capture=capture,
        provenance=provenance(config),
        planned_parts=tuple(parts),
    )


def _keys_of_finished_parts(path: str) -> dict[str, str]:
    """Sample key -> part, of what earlier runs have cached: the join is by key, so a key occurs once in a store."""
    store = Store(path)
    return {entry.key: part for part in store.parts for entry in store.entries(part)}


def _device(name: str) -> torch.device:
    if name == "auto":
        # torchrun numbers the workers of a machine: each has its own GPU.
        gpu = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
        name = gpu if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"teacher.device: {name!r} is no device; use auto, cpu, cuda or cuda:1") from error


def _usable(device: torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts, CUDA without a GPU raises
        reason = str(error).splitlines()[0]
        raise ConfigError(f"teacher.device: {device} cannot be used here ({reason}); use auto") from error
    return device


def _compute_dtype(config: Config, plan: TeacherPlan) -> torch.dtype:
    """The dtype asked for; `auto` is the checkpoint's own on a GPU and float32 on a CPU, which has no other speed."""
    if config.teacher.dtype != "auto":
        return getattr(torch, config.teacher.dtype)
    if _device(config.teacher.device).type == "cpu":
        return torch.float32
    stored = plan.config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _summary(
    config: Config, summaries: Sequence[PartSummary], *, parts_found: int, broken: Sequence[str]
) -> CacheSummary:
    return CacheSummary(
        path=config.one_cache.path,
        parts_written=len(summaries),
        parts_found=parts_found,
        seen=sum(s.seen for s in summaries),
        cached=sum(s.cached for s in summaries),
        rejected=sum(s.rejected for s in summaries),
        bytes_written=sum(sum(s.array_bytes.values()) for s in summaries),
        broken=tuple(broken),
    )
