"""What a data set of many samples holds in memory: its join alone, in the process and in one of its loading workers.

    ALIGNKD_JOIN_SAMPLES=1000000 python -m pytest -s tests/test_join_memory.py

The store is made up: names of nine digits, one image a sample, the targets of a finetuning of MobileVLM V2 with small
arrays, for the join does not read them. A process of its own opens it; the figure is its resident memory after the
join, less that before. Then it forks, as torch's loader does, and the worker looks up half of the samples in a
shuffled order. What a worker adds is the pages that it no longer shares, less those of a worker that does nothing.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from bench.processes import counters
from bench.synthetic import SIZES, add_sample, manifest, samples
from bench.turns import own_process
from cache import Store, StoreWriter
from pipeline.distill.join.dataset import JoinedDataset

pytestmark = pytest.mark.slow

SAMPLES_A_SHARD = 10_000
NUM_SAMPLES = int(os.environ.get("ALIGNKD_JOIN_SAMPLES", 30_000))


def write_store(folder: Path, num_samples: int) -> None:
    """Write empty shards, and a store of so many samples, all with the arrays of one."""
    [arrays] = samples(SIZES["small"], 1)
    starts = range(0, num_samples, SAMPLES_A_SHARD)
    parts = {f"shard-{start // SAMPLES_A_SHARD:06d}": start for start in starts}
    writer = StoreWriter.open(folder / "store", manifest(SIZES["small"], list(parts)))
    (folder / "shards").mkdir()
    for name, start in parts.items():
        (folder / "shards" / f"{name}.tar").touch()
        with writer.part(name, source={}) as part:
            for index in range(start, min(start + SAMPLES_A_SHARD, num_samples)):
                add_sample(part, index, arrays)
            part.commit()


def measure(folder: Path) -> dict[str, float]:
    """Join the store as stage 2 does, and look samples up in a forked worker; bytes and CPU seconds a sample."""
    nothing: Any = None  # no text is tokenised
    before, started = counters("status")["VmRSS"], time.process_time()
    dataset = JoinedDataset(Store(folder / "store"), str(folder / "shards"), nothing, targets={})
    store, number = dataset.stores.opened[0], len(dataset)
    len(store)  # makes the index by key, as the first sample that is read does
    seconds = time.process_time() - started
    gc.collect()
    held = counters("status")["VmRSS"] - before
    order = random.Random(0).sample(range(number), number // 2)

    def look_up() -> float:
        started = time.process_time()
        for row in order:
            _, entry = dataset.rows[row]
            store.locate(entry.key)
        return (time.process_time() - started) / len(order)

    _, unshared_idle = _in_worker(lambda: sum(order) * 0.0)
    look_up_seconds, unshared = _in_worker(look_up)
    return {
        "join_cpu_seconds": seconds,
        "bytes_a_sample": held / number,
        "worker_bytes_a_sample": (unshared - unshared_idle) / number,
        "look_up_cpu_seconds": look_up_seconds,
    }


def _in_worker(work: Callable[[], float]) -> tuple[float, int]:
    """Run the work in a forked process; its result, and the bytes of memory that the process shares with none."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def answer() -> None:
        found, pages = work(), counters("smaps_rollup")
        sender.send((found, sum(size for name, size in pages.items() if name.startswith("Private"))))

    process = context.Process(target=answer)
    process.start()
    found = receiver.recv()
    process.join()
    return found


def test_a_sample_costs_the_join_some_hundred_bytes_and_a_loading_worker_fewer(tmp_path: Path):
    """With few samples, memory that does not grow with them counts as well."""
    write_store(tmp_path, NUM_SAMPLES)
    with own_process() as process:
        found = process.submit(measure, tmp_path).result()
    print(*(f"{name} {value:.6g}" for name, value in found.items()), sep="\n")
    assert 100 < found["bytes_a_sample"] < 600 and found["worker_bytes_a_sample"] < 300
