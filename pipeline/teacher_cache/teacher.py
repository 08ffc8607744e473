"""Stage 1: run every sample of the shards through the teacher, and write one immutable part for each shard."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from cache import (
    FORMAT_VERSION,
    ArraySpec,
    CacheError,
    DuplicateKey,
    Fingerprint,
    FingerprintMismatch,
    HoldsFewer,
    Manifest,
    PartSummary,
    Store,
    StoreWriter,
    digest_of,
)
from pipeline.config.config import Config
from pipeline.config.provenance import provenance
from pipeline.data.load_preparation import load_preparation
from pipeline.data.pairing import check_student
from pipeline.data.preparation import Preparation, capture_settings
from pipeline.data.shard_kinds import part_name
from pipeline.data.shard_names import expand_shards
from pipeline.data.spans import warn_of_streams
from pipeline.errors import ConfigError, ShardError
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import TeacherPlan, family_digest, plan_teacher
from pipeline.teacher_cache.ahead import Ahead
from pipeline.teacher_cache.blindness import FIELD, Blindness, warn_of_blindness
from pipeline.teacher_cache.capture import Capture, Captured
from pipeline.teacher_cache.overlap import Behind
from pipeline.teacher_cache.part_states import PartStates
from pipeline.teacher_cache.progress import Progress
from pipeline.teacher_cache.swapped_images import measure_blindness
from pipeline.teacher_cache.workers import ALONE, Worker, shards_to_write

TOKEN_ARRAYS = (
    ArraySpec("input_ids", "S", (), "sample", "integer", {"dtype": "int32"}),
    ArraySpec("labels", "S", (), "sample", "integer", {"dtype": "int32"}),
)


@dataclass(frozen=True)
class CacheSummary:
    """The parts that a run of stage 1 wrote and found done, and the samples of those that it wrote.

    `broken` holds why the part of a shard was not written, `changed` how a shard differs from the one that its part
    was captured from.
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
    """Write every missing part of the store. The teacher is loaded only if one is missing.

    Several workers may write one store: each begins with its share of the shards, and takes over shards that are
    left. A shard that cannot be read, or whose part cannot be read, is left out and reported in the summary. With
    `recapture_changed` the part of a changed shard is replaced. Raises `FingerprintMismatch`, before anything is
    written, if the store was captured otherwise, and `CorruptPart` or `UnreadableFile` if an index cannot be read,
    since its keys may be taken.
    """
    check_student(config)
    plan = plan_capture(config)
    warn_of_streams(plan.shards)
    # One worker measures for all.
    return write_parts(plan, worker, recapture_changed=recapture_changed, asks_if_blind=worker.rank == 0)


@dataclass(frozen=True)
class CapturePlan:
    """All that stage 1 needs from a config, before a weight is loaded or a file written."""

    config: Config
    shards: tuple[str, ...]
    preparation: Preparation
    teacher: TeacherPlan
    dtype: torch.dtype
    device: torch.device
    manifest: Manifest


def plan_capture(config: Config) -> CapturePlan:
    """Find the shards, hash tokenizer and teacher, and describe the store.

    Raises `ConfigError` if the config names several stores.
    """
    config.check_one_cache()
    shards = tuple(expand_shards(config.data.captured_shards()))
    preparation = load_preparation(config.teacher.model, config.data)
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
    asks_if_blind: bool = False,
    count: Callable[[int], object] = lambda done: None,
) -> CacheSummary:
    """Capture the shards of the plan that have no part, and again those whose part is in `recapture`.

    A part is replaced only when the new one is whole, and only by one with at least as many samples, unless
    `may_hold_fewer` or the shard changed. With `asks_if_blind` the teacher's use of the images is measured first.
    `count` gets how many samples were captured or rejected.
    """
    config, shards = plan.config, plan.shards
    if not (recapture or recapture_changed) and (found := _finished_in_older_format(plan)):
        return found
    store = StoreWriter.open(config.one_cache.path, plan.manifest)
    states = PartStates(store, shards, recapture, recapture_changed)
    todo = [shard for shard in shards if states.needs_capture(shard)]
    found = len(shards) - len(todo) - len(states.refused)
    run = _Run(store, states, may_hold_fewer or recapture_changed)
    if todo:
        store.leave_out(states.holds_keys)
        store.taken.refresh()
        teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=_usable(plan.device))
        if asks_if_blind:
            _ask_if_blind(plan, store, teacher)
        with Progress(todo, description="teacher-cache", count=count) as progress, Ahead() as ahead:
            capture = Capture(config, teacher, plan.preparation, progress, ahead)
            while todo:
                todo = run.capture_all(capture, todo, worker)
    if run.summaries or worker.world_size > 1:
        store.taken.check()
    return run.summary(config.one_cache.path, parts_found=found)


def _ask_if_blind(plan: CapturePlan, store: StoreWriter, teacher: Teacher) -> None:
    """Measure once for each store whether the answers depend on the images; print the result, and warn."""
    known = store.manifest.provenance.get(FIELD)
    found = Blindness.from_json(known) if known else None
    if found is None or found.not_measured:
        found = measure_blindness(plan.config, plan.shards, plan.preparation, teacher)
        store.set_provenance(FIELD, found.to_json())
        print(f"use of the images: {found}", file=sys.stderr)
    warn_of_blindness(
        found, plan.config.teacher, then="The capture goes on; stop it with Ctrl-C if this is wrong."
    )


def _finished_in_older_format(plan: CapturePlan) -> CacheSummary | None:
    """Return that a store of an older format is finished, as which it is used; None where nothing is to be found."""
    path = plan.config.one_cache.path
    try:
        store = Store(path)
    except CacheError:
        return None  # whoever opens it to write says what is wrong
    parts = {part_name(shard) for shard in plan.shards}
    if store.manifest.format_version == FORMAT_VERSION or not parts <= set(store.parts):
        return None
    expected = replace(plan.manifest, arrays=store.manifest.arrays)  # it describes its arrays otherwise
    if differences := store.manifest.differences(expected):
        remedy = "Restore the settings that the store was written with, or write to another directory."
        raise FingerprintMismatch(store.path, differences, remedy=remedy)
    return CacheSummary(path, 0, len(parts), 0, 0, 0, 0, (), ())


class _Run:
    """A run of stage 1: the parts that it wrote, and why others were not written."""

    def __init__(self, store: StoreWriter, states: PartStates, may_hold_fewer: bool) -> None:
        self.store, self.states, self.may_hold_fewer = store, states, may_hold_fewer
        self.summaries: list[PartSummary] = []
        self.broken: list[str] = []
        self.again: list[str] = []

    def capture_all(self, capture: Capture, todo: Sequence[str], worker: Worker) -> list[str]:
        """Capture the shards one after the other. Return those that must be captured once more.

        A part is compressed and written while the teacher works on the next shard.
        """
        self.again = []
        order = worker.in_order(todo)
        free = shards_to_write(
            self.store, todo, worker, needs_capture=self.states.needs_capture, say=capture.progress.say
        )
        with Behind(limit=1) as writing:
            for shard, lease in free:
                with lease:  # ends here, unless there is a part to write
                    try:
                        coming = next(iter(order[order.index(shard) + 1 :]), None)
                        captured = capture.run(self.store, shard, coming=coming)
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
                # Another worker has just published the key: capture the shard without that sample.
                self.again.append(shard)
            except HoldsFewer as error:
                self.broken.append(str(error))
            else:
                self.summaries.append(summary)
                capture.progress.end_shard(summary)

    def summary(self, path: str, *, parts_found: int) -> CacheSummary:
        return CacheSummary(
            path=path,
            parts_written=len(self.summaries),
            parts_found=parts_found,
            seen=sum(s.seen for s in self.summaries),
            cached=sum(s.cached for s in self.summaries),
            rejected=sum(s.rejected for s in self.summaries),
            bytes_written=sum(sum(s.array_bytes.values()) for s in self.summaries),
            broken=(*self.broken, *self.states.refused.values()),
            changed=tuple(f"{shard} ({change})" for shard, change in self.states.changed.items()),
        )


def build_manifest(
    config: Config, plan: TeacherPlan, preparation: Preparation, *, dtype: torch.dtype, parts: Sequence[str]
) -> Manifest:
    """Return the description of the store, which is written before anything is captured."""
    capture = capture_settings(config, dtype=str(dtype).removeprefix("torch."))
    arrays = [spec for target in config.targets.cached().values() for spec in target.arrays(plan.facts)]
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=Fingerprint(
            teacher=plan.digest,
            capture=digest_of(capture),
            family=family_digest(plan.config),
            **preparation.digests(),
        ),
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
    """Return the configured dtype. `auto` is the checkpoint's own on a GPU, and float32, the fastest, on a CPU."""
    if config.teacher.dtype != "auto":
        return getattr(torch, config.teacher.dtype)
    if _device(config.teacher.device).type == "cpu":
        return torch.float32
    stored = plan.config.dtype or plan.config.get_text_config().dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32
