"""What a data set of many samples holds in memory: its join alone, in the process and in one of its loading workers.

python -m bench.join_memory --samples 1000000

The store is made up: indexes in the shapes of a finetuning of MobileVLM V2 (one image a sample, names of nine digits,
attention of one layer, vision, top 32 logits), no arrays and no images, for the join reads neither. A process of its
own opens it; the figure is its resident memory after the join, less that before. Then it forks, as torch's loader
does, and the worker looks up half of the samples in a shuffled order. What a worker adds is the pages that it no
longer shares, less those of a worker that does nothing.
"""

from __future__ import annotations

import gc
import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer

from bench.processes import counters, reset_peak
from bench.synthetic import SIZES, manifest
from bench.turns import own_process
from cache import SampleEntry, Span, Store, StoreWriter
from cache.format.documents import document_bytes
from cache.format.index import PartIndex
from cache.format.records import Counts, PartRecord
from pipeline.distill.join.dataset import JoinedDataset

SAMPLES_A_SHARD = 10_000
app = typer.Typer(add_completion=False)


def write_store(folder: Path, num_samples: int) -> None:
    """Write empty shards, and a store that has an index of each."""
    starts = range(0, num_samples, SAMPLES_A_SHARD)
    parts = [f"shard-{number:06d}" for number in range(len(starts))]
    planned = manifest(SIZES["full"], parts)
    of_text = [spec.name for spec in planned.arrays if spec.owner == "sample"]
    store = StoreWriter.open(folder / "store", planned).path
    (folder / "shards").mkdir()
    for start, part in zip(starts, parts, strict=True):
        (folder / "shards" / f"{part}.tar").touch()
        entries = [_entry(number) for number in range(start, min(start + SAMPLES_A_SHARD, num_samples))]
        counts, n = [100 + number % 37 for number in range(len(entries))], len(entries)
        index = PartIndex.of(
            entries, [of.images[0] for of in entries], row_counts=dict.fromkeys(of_text, counts)
        )
        record = PartRecord(part, planned.contents_digest(), {}, Counts(n, n, 0, n, n), None, {})
        (store / "parts" / part).mkdir()
        for name, document in (("index.json", index), ("part.json", record)):
            (store / "parts" / part / name).write_bytes(document_bytes(document.to_json()))


def _entry(number: int) -> SampleEntry:
    key, place = f"{number:09d}", 512 + number % SAMPLES_A_SHARD * 90_112
    digest = hashlib.blake2b(key.encode(), digest_size=32).hexdigest()
    image, text = Span(f"{key}.jpg", place, 80_000), Span(f"{key}.json", place + 81_920, 900)
    return SampleEntry(key, (digest,), (image,), text)


def measure(folder: Path) -> dict[str, float]:
    """Join the store as stage 2 does, and look samples up in a forked worker; bytes and CPU seconds a sample."""
    nothing: Any = None  # no text is tokenised
    reset_peak()
    before, started = counters("status")["VmRSS"], time.process_time()
    dataset = JoinedDataset(Store(folder / "store"), str(folder / "shards"), nothing, targets={})
    store, samples = dataset.stores.opened[0], len(dataset)
    len(store)  # makes the index by key, as the first sample that is read does
    seconds, peak = time.process_time() - started, counters("status")["VmHWM"]
    gc.collect()
    held = counters("status")["VmRSS"] - before
    order = random.Random(0).sample(range(samples), samples // 2)

    def look_up() -> float:
        started = time.process_time()
        for number in order:
            _, entry = dataset.rows[number]
            store.locate(entry.key)
        return (time.process_time() - started) / len(order)

    _, unshared_idle = _in_worker(lambda: sum(order) * 0.0)
    look_up_seconds, unshared = _in_worker(look_up)
    return {
        "join_cpu_seconds": seconds,
        "bytes_a_sample": held / samples,
        "peak_bytes_a_sample": (peak - before) / samples,
        "worker_bytes_a_sample": (unshared - unshared_idle) / samples,
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


@app.command(help=__doc__.splitlines()[0])
def main(samples: int = 1_000_000) -> None:
    with tempfile.TemporaryDirectory() as folder, own_process() as process:
        write_store(Path(folder), samples)
        found = process.submit(measure, Path(folder)).result()
    print(f"{samples:,} samples")
    print(*(f"{name:<22} {value:12.6g}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    app()
