"""What bench/growth.py runs: the contestants of bench/stage1.py and bench/stage2.py, on data of one size."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import flops
import stage1
import stage2
from side_by_side import Work, answer, ask, start

SHARDS_TO_SHARE = 4
SOON = 0.02  # seconds


@dataclass(frozen=True)
class Point:
    """A size, and what runs: `stage 1`, `workers` that do it together, a `share` of them; `cached`, `loading`."""

    work: str
    tokens: int  # about so many positions a sample
    samples: int
    batch_size: int
    workers: int = 0
    rank: int = 0  # of a `share`

    @property
    def name(self) -> str:
        """As a command line can carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, name: str) -> Point:
        """What `name` says."""
        return cls(**json.loads(name))

    @property
    def folder(self) -> str:
        """Where its data lie: the same for all that differ in workers alone."""
        shared = "-shared" if self.is_shared else ""
        return f"{self.tokens}x{self.samples}by{self.batch_size}{shared}"

    @property
    def is_shared(self) -> bool:
        return self.work in ("workers", "share")

    def options(self, size: str, folder: Path) -> argparse.Namespace:
        """As the command line of a stage's bench would give them."""
        return argparse.Namespace(
            size=size,
            tokens=self.tokens,
            samples=self.samples,
            batch_size=self.batch_size,
            workers=self.workers,
            folder=str(folder / self.folder),
        )


def prepare(point: Point, size: str, folder: Path) -> None:
    """Models, once for all sizes; shards and, for stage 2, the store of this one."""
    from random_models import write_model, write_shard

    data = folder / point.folder
    data.mkdir(exist_ok=True)
    for role in ("teacher", "student"):
        if not (folder / role).exists():
            write_model(folder / role, size, role)
        if not (data / role).exists():
            (data / role).symlink_to(folder / role)
    if not (data / "data").exists():
        shards = min(SHARDS_TO_SHARE, point.samples) if point.is_shared else 1
        write_shard(data / "data", samples=point.samples, tokens=point.tokens, shards=shards)
    if point.work in ("cached", "loading"):
        stage2.prepare(point.options(size, folder))


def work_of(script: str, point: Point, options: argparse.Namespace) -> Work:
    """A turn of the point, which also counts how long samples are and what getting ready took.

    That is CPU seconds, of all threads: sizes get ready at the same time, and wait for each other.
    """
    folder = Path(options.folder)
    of_stage = point.options(options.size, folder)
    if point.work == "workers":
        return _sharing(script, point, of_stage, [f"--size={options.size}", f"--folder={folder}"])
    if point.work == "share":
        return _share(point, of_stage)
    table = stage1.CONTESTANTS if point.work == "stage 1" else stage2.CONTESTANTS
    work = table[point.work](of_stage)
    lengths = _lengths(of_stage)
    facts = {
        **lengths,
        "startup_cpu_seconds": time.process_time(),
        "flops": _flops(point, options.size, lengths),
    }
    return lambda: {**work(), **facts}


def _flops(point: Point, size: str, lengths: Mapping[str, float]) -> float:
    """Operations of a sample of mean lengths, by bench/flops.py."""
    from random_models import MODELS

    sample = flops.Sample(*(round(lengths[name]) for name in ("positions", "text_rows", "answers")))
    if point.work == "stage 1":
        return flops.stage_1(flops.Model.of(MODELS[size, "teacher"]), sample)
    return flops.stage_2(flops.Model.of(MODELS[size, "student"]), sample, checkpointing=False)


def _lengths(options: argparse.Namespace) -> dict[str, float]:
    """Means over samples: positions, vision tokens included; rows of text after the image; answers."""
    from pipeline.data.preparation import Preparation
    from pipeline.data.shards import Sample, expand_shards, read_shard
    from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    config = stage1.config_of(options, stage1.TARGETS)
    preparation = Preparation.of(config.teacher.model, config.data)
    samples = [
        preparation.tokenize(item.conversations)
        for shard in expand_shards(config.data.shards)
        for item in read_shard(shard)
        if isinstance(item, Sample)
    ]
    ids = [of.input_ids for of in samples]
    return {
        "positions": mean(map(preparation.merged_length, ids)),
        "text_rows": mean(len(of) - of.index(IMAGE_TOKEN_INDEX) - 1 for of in ids),
        "answers": mean(sum(label != IGNORE_INDEX for label in of.labels) for of in samples),
    }


def _sharing(script: str, point: Point, options: argparse.Namespace, arguments: list[str]) -> Work:
    """Processes of stage 1 with one thread each, which write one store together, from an empty one."""
    shares = [replace(point, work="share", rank=rank) for rank in range(point.workers)]
    workers = [start(script, of.name, arguments, environment={"OMP_NUM_THREADS": "1"}) for of in shares]
    for worker in workers:
        answer(worker)

    def turn() -> Mapping[str, float]:
        shutil.rmtree(Path(options.folder) / _store_of(point), ignore_errors=True)
        for worker in workers:
            ask(worker)
        answers = [answer(worker) for worker in workers]
        written = sum(of["counted"]["samples"] for of in answers)
        assert written == point.samples, f"{written} samples written, not {point.samples}"
        return {"samples": written, "peak_bytes": sum(of["peak_bytes"] for of in answers)}

    return turn


def _share(point: Point, options: argparse.Namespace) -> Work:
    """One of these processes; loading the teacher is a part of its turn, as of every run of stage 1."""
    from pipeline.teacher_cache import workers
    from pipeline.teacher_cache.teacher import plan_capture, write_parts

    # A worker with nothing left looks every few seconds whether the others are done: in hours that is
    # nothing, here it would be all that is measured.
    workers.POLL_SECONDS = SOON
    plan = plan_capture(stage1.config_of(options, stage1.TARGETS, store=_store_of(point)))
    return lambda: {"samples": write_parts(plan, workers.Worker(point.rank, point.workers)).cached}


def _store_of(point: Point) -> str:
    return f"store-of-{point.workers}"
