"""What a target costs a student either way, measured on the probe: reading its bytes, or the stub's forward again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cache import Store, drop_from_memory
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import pad_tokens
from pipeline.data.shards import Sample, read_shard
from pipeline.errors import BadSample
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.target import Target
from pipeline.teacher_cache.teacher import CapturePlan

FORWARDED_SAMPLES = 32
BATCH_SIZE = 8
Ready = tuple[TokenizedSample, list[torch.Tensor]]  # a sample's tokens, and the pixels of its images


@dataclass(frozen=True)
class Costs:
    """Of a sample, in seconds: its stored bytes read and decoded (0: none are stored), and the stub's forward."""

    reading_seconds: float
    forward_seconds: float


def measure_costs(
    plan: CapturePlan, store: Path, shards: Sequence[str], *, known: dict[str, float]
) -> dict[str, Costs]:
    """Of every active target that a stub can make again; `store` and `shards` are the probe's.

    Samples are read as in random order, each with the chunks that it lies in, by one process; a chunk comes from the
    disk the first time, where the system lets go of what it holds of files, and is decoded every time. The stub runs
    on the device, in the dtype and with the pixels of stage 1, in batches of 8, for samples of which each brings its
    own images. `known` holds the seconds of stubs by target, and takes those of the others: how a target is stored is
    nothing to its stub.
    """
    stored = plan.config.targets.cached()
    again = {
        name: target for name, target in plan.config.targets.active().items() if target.deepest is not None
    }
    if again.keys() - known.keys():
        samples = list(islice(_prepared(plan, shards), FORWARDED_SAMPLES))
        known |= {name: _forward(plan, name, s, samples) for name, s in again.items() if name not in known}
    return {
        name: Costs(_reading(plan, store, target) if name in stored else 0.0, known[name])
        for name, target in again.items()
    }


def _reading(plan: CapturePlan, folder: Path, target: Target) -> float:
    """Seconds a sample, once every part of the probe is open."""
    store = Store(folder, cache_bytes=0)
    arrays = [spec.name for spec in target.arrays(plan.teacher.facts)]
    keys = [[entry.key for entry in store.entries(part)] for part in store.parts]
    for of_part in keys:
        for key in of_part[:1]:
            store.read(key, arrays)
    drop_from_memory(folder)
    started = time.perf_counter()
    for of_part in keys:
        for key in of_part:
            store.read(key, arrays)
    return (time.perf_counter() - started) / max(1, sum(map(len, keys)))


def _prepared(plan: CapturePlan, shards: Sequence[str]) -> Iterator[Ready]:
    for shard in shards:
        for item in read_shard(shard, max_pixels=plan.config.data.max_image_pixels):
            try:
                if isinstance(item, Sample):
                    tokens = plan.preparation.tokenize(item.conversations)
                    yield tokens, [plan.preparation.preprocess(image) for image in item.images]
            except BadSample:  # the probe's rejects; stage 1 tells them
                continue


def _forward(plan: CapturePlan, name: str, settings: Any, samples: Sequence[Ready]) -> float:
    """Seconds a sample, after one batch that is not counted; 0 where the probe holds no usable sample."""
    if not samples:
        return 0.0
    stub = plan_teacher(plan.config.teacher.model, targets={name: settings})
    teacher = load_teacher(stub, dtype=plan.dtype, device=plan.device)
    batches = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    _run(teacher, batches[0])
    started = time.perf_counter()
    for batch in batches:
        _run(teacher, batch)
    return (time.perf_counter() - started) / len(samples)


def _run(teacher: Teacher, batch: Sequence[Ready]) -> None:
    pixels = [image for _, images in batch for image in images]
    vision = teacher.encode_images(torch.stack(pixels)) if pixels else None
    if teacher.attention_layers:
        teacher.forward(**pad_tokens([tokens for tokens, _ in batch]), vision=vision)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)
