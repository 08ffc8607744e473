"""Measure on the probe what a target costs a student: reading its stored bytes, or the stub's forward pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from cache import Store, drop_from_memory
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import pad_tokens
from pipeline.data.shards import Sample, read_shard
from pipeline.errors import BadSample
from pipeline.models.processors import Tensors
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.target import Target, TeacherFacts
from pipeline.teacher_cache.teacher import CapturePlan

FORWARDED_SAMPLES = 32
BATCH_SIZE = 8
# A target of LARGE_BYTES for a sample or more is recomputed even if that takes PATIENCE times as long as reading: a
# student takes longer for a sample, and disks cost money.
LARGE_BYTES = 100_000
PATIENCE = 4
Ready = tuple[TokenizedSample, list[Tensors]]  # a sample's tokens, and the pixel inputs of its images


@dataclass(frozen=True)
class Costs:
    """Seconds of a sample: reading and decoding its stored bytes (0 if not stored), and the stub's forward pass."""

    reading_seconds: float
    forward_seconds: float


def measure_costs(
    plan: CapturePlan, store: Path, shards: Sequence[str], *, known: dict[str, float]
) -> dict[str, Costs]:
    """Return the costs of every active target that can be recomputed; `store` and `shards` are the probe's.

    Reading is as in random order, by one process: a sample brings the chunks that it lies in, which come from the
    disk the first time (where the system can drop cached files) and are decoded every time. The stub runs as stage 1
    does: same device, dtype and pixels, in batches of 8, each sample with its own images. `known`, stub seconds by
    target, is used and extended: how a target is stored does not matter to its stub.
    """
    active = plan.config.targets.active()
    targets = {name: target for name, target in active.items() if target.can_be_recomputed()}
    if targets.keys() - known.keys():
        samples = list(islice(_prepared(plan, shards), FORWARDED_SAMPLES))
        known |= {name: _forward(plan, name, t, samples) for name, t in targets.items() if name not in known}
    stored = plan.config.targets.cached()
    return {
        name: Costs(_reading(plan, store, target) if name in stored else 0.0, known[name])
        for name, target in targets.items()
    }


def what_recomputes(target: Target, facts: TeacherFacts) -> str | None:
    """Return which part of the teacher recomputes a target, in words; None if stage 2 cannot recompute it."""
    if not target.can_be_recomputed():
        return None
    if target.deepest is None:
        return "the whole teacher"
    if target.hidden_layer is not None:
        return f"the tower, the projector and the decoder's first {target.hidden_layer} layers"
    return f"the tower, the projector and {max(target.deepest, 0)} of {facts.num_layers} layers"


def advice(costs: Costs, *, bytes_each: float, runs: str | None) -> str:
    """Return the advice to store or recompute, from what both cost a sample; `runs` as `what_recomputes` returns."""
    if runs is None:
        return "store: it needs the whole teacher"
    again = f"{1000 * costs.forward_seconds:.2f} ms to recompute it ({runs})"
    if not bytes_each:
        return f"recompute: no bytes; {again}"
    patience = PATIENCE if bytes_each > LARGE_BYTES else 1
    choice = "recompute" if costs.forward_seconds <= patience * costs.reading_seconds else "store"
    return f"{choice}: {1000 * costs.reading_seconds:.2f} ms to read a sample, {again}"


def _reading(plan: CapturePlan, folder: Path, target: Target) -> float:
    """Seconds a sample, once every part of the probe is open."""
    store = Store(folder, cache_bytes=0)
    arrays = [spec.name for spec in target.arrays(plan.teacher.facts)]
    parts = [[entry.key for entry in store.entries(part)] for part in store.parts]
    for keys in parts:
        for key in keys[:1]:
            store.read(key, arrays)
    drop_from_memory(folder)
    keys = [key for keys in parts for key in keys]
    started = time.perf_counter()
    for key in keys:
        store.read(key, arrays)
    return (time.perf_counter() - started) / max(1, len(keys))


def _prepared(plan: CapturePlan, shards: Sequence[str]) -> Iterator[Ready]:
    for shard in shards:
        for item in read_shard(shard, max_pixels=plan.config.data.max_image_pixels):
            try:
                if isinstance(item, Sample):
                    sizes = plan.preparation.sizes_of(item.images)
                    tokens = plan.preparation.tokenize(item.conversations, sizes)
                    yield tokens, [plan.preparation.preprocess(image) for image in item.images]
            except BadSample:  # stage 1 reports it
                continue


def _forward(plan: CapturePlan, name: str, target: Target, samples: Sequence[Ready]) -> float:
    """Seconds a sample, after one batch of warm-up; 0 if the probe holds no usable sample."""
    if not samples:
        return 0.0
    stub = plan_teacher(plan.config.teacher.model, targets={name: target})
    teacher = load_teacher(stub, dtype=plan.dtype, device=plan.device)
    batches = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    image_token_id = plan.preparation.image_token_id
    _run(teacher, batches[0], image_token_id)
    started = time.perf_counter()
    for batch in batches:
        _run(teacher, batch, image_token_id)
    return (time.perf_counter() - started) / len(samples)


def _run(teacher: Teacher, batch: Sequence[Ready], image_token_id: int) -> None:
    pixels = [image for _, images in batch for image in images]
    sizes = [size for tokens, _ in batch for size in tokens.sizes]
    features = teacher.encode_images(pixels, sizes) if pixels else None
    if teacher.runs_decoder:
        teacher.forward(pad_tokens([tokens for tokens, _ in batch], image_token_id), features)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)
