"""Stage 1: shards -> teacher -> store. One tar shard in, one immutable part out; every sample cached or rejected."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial

import torch

from cache import (
    FORMAT_VERSION,
    ArraySpec,
    DuplicateKey,
    Fingerprint,
    HoldsFewer,
    Manifest,
    PartSummary,
    StoreWriter,
    digest_of,
)
from pipeline.config.config import Config
from pipeline.config.provenance import provenance
from pipeline.data.pairing import check_student
from pipeline.data.preparation import Preparation, capture_settings
from pipeline.data.shards import expand_shards, part_name
from pipeline.errors import ConfigError, ShardError
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import TeacherPlan, plan_teacher
from pipeline.teacher_cache.capture import Capture, Captured
from pipeline.teacher_cache.overlap import Behind
from pipeline.teacher_cache.part_states import PartStates
from pipeline.teacher_cache.progress import Progress
from pipeline.teacher_cache.workers import ALONE, Worker, shards_to_write

TOKEN_ARRAYS = (
    ArraySpec("input_ids", "S", (), "sample", "integer", {"dtype": "int32"}),
    ArraySpec("labels", "S", (), "sample", "integer", {"dtype": "int32"}),
)


@dataclass(frozen=True)
class CacheSummary:
    """What a run of stage 1 did: parts written now and found done, and the samples of those written now.

    `broken` says of each shard what kept its part from being written, `changed` of each shard that is not the one its
    part was captured from what differs.
    """

    path: str
    parts_written: int
    parts_found: int
    seen: int
    cached: int
    rejected: int
    bytes_written: int
    broken: tuple[str, ...]
    changed: tuple[str, ...]


def cache_teacher(config: Config, worker: Worker = ALONE, *, recapture_changed: bool = False) -> CacheSummary:
    """Write every part of the store that is not there yet; the teacher is loaded only if one is missing.

    Several workers may write one store: each begins with its share of the shards, and takes over what others left.
    A shard that cannot be read, or whose part cannot be read, is left out and reported in the summary; the others are
    cached all the same. With `recapture_changed` a part whose shard changed is replaced by one of the shard as it is.
    Raises `FingerprintMismatch` if the store holds something else, before anything is written, and `CorruptPart` or
    `UnreadableFile` if an index cannot be read: which keys are free cannot be told then.
    """
    check_student(config)
    return write_parts(plan_capture(config), worker, recapture_changed=recapture_changed)


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


def write_parts(
    plan: CapturePlan,
    worker: Worker = ALONE,
    *,
    recapture: Collection[str] = (),
    recapture_changed: bool = False,
    may_hold_fewer: bool = False,
) -> CacheSummary:
    """Capture the shards of the plan that have no part yet, and again those of the parts named by `recapture`.

    A part that is captured again makes room only when the new one is whole, and not for one that holds fewer samples,
    unless `may_hold_fewer`; of a changed shard it may.
    """
    config, shards = plan.config, plan.shards
    store = StoreWriter.open(config.one_cache.path, plan.manifest)
    states = PartStates(store, shards, recapture, recapture_changed)
    todo = [shard for shard in shards if states.needs_capture(shard)]
    found = len(shards) - len(todo) - len(states.refused)
    run = _Run(store, states, may_hold_fewer or recapture_changed)
    if todo:
        store.leave_out(states.holds_keys)
        store.taken.refresh()
        teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=_usable(plan.device))
        with Progress(todo, description="teacher-cache") as progress:
            capture = Capture(config, teacher, plan.preparation, progress)
            while todo:
                todo = run.capture_all(capture, todo, worker)
    if run.summaries or worker.world_size > 1:
        store.taken.check()
    return _summary(config, run, parts_found=found)


class _Run:
    """A run of stage 1: the parts that it wrote, and the shards that it could not."""

    def __init__(self, store: StoreWriter, states: PartStates, may_hold_fewer: bool) -> None:
        self.store, self.states, self.may_hold_fewer = store, states, may_hold_fewer
        self.summaries: list[PartSummary] = []
        self.broken: list[str] = []
        self.again: list[str] = []

    def capture_all(self, capture: Capture, todo: Sequence[str], worker: Worker) -> list[str]:
        """Capture every shard that is free, one after the other; the shards that must be captured once more.

        A part is compressed and written while the teacher is at work on the next shard.
        """
        self.again = []
        free = shards_to_write(
            self.store, todo, worker, needs_capture=self.states.needs_capture, say=capture.progress.say
        )
        with Behind(limit=1) as writing:
            for shard, lease in free:
                with lease:  # it ends here, unless there is a part to write
                    try:
                        captured = capture.run(self.store, shard)
                    except ShardError as error:
                        if capture.config.data.on_bad_sample == "fail":
                            raise
                        self.broken.append(str(error))
                    else:
                        writing.do(partial(self._write, capture, shard, captured, lease.pop_all()))
        return self.again

    def _write(self, capture: Capture, shard: str, captured: Captured, lease: ExitStack) -> None:
        replace = self.states.replaces(shard)
        with lease:
            try:
                summary = captured.commit(capture, replace=replace, may_hold_fewer=self.may_hold_fewer)
            except DuplicateKey:
                # Another worker published the key in this very moment: capture the shard without that sample.
                self.again.append(shard)
            except HoldsFewer as error:
                self.broken.append(str(error))
            else:
                self.summaries.append(summary)
                capture.progress.end_shard(summary)


def build_manifest(
    config: Config, plan: TeacherPlan, preparation: Preparation, *, dtype: torch.dtype, parts: Sequence[str]
) -> Manifest:
    """What the store will say of itself, before anything is captured."""
    capture = capture_settings(config, dtype=str(dtype).removeprefix("torch."))
    arrays = [spec for target in config.targets.cached().values() for spec in target.arrays(plan.facts)]
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


def _summary(config: Config, run: _Run, *, parts_found: int) -> CacheSummary:
    summaries, states = run.summaries, run.states
    return CacheSummary(
        path=config.one_cache.path,
        parts_written=len(summaries),
        parts_found=parts_found,
        seen=sum(s.seen for s in summaries),
        cached=sum(s.cached for s in summaries),
        rejected=sum(s.rejected for s in summaries),
        bytes_written=sum(sum(s.array_bytes.values()) for s in summaries),
        broken=(*run.broken, *states.refused.values()),
        changed=tuple(f"{shard} ({change})" for shard, change in states.changed.items()),
    )
