"""What a data set of many samples holds in memory: its join alone, in the process and in one of its loading workers.

python bench/growth.py --join 1000000

The store is made up: indexes in the shapes of a finetuning of MobileVLM V2 (one image a sample, names of nine digits,
attention of one layer, vision, top 32 logits), no arrays and no images, for the join reads neither. A process of its
own opens it; what it holds is what it is resident with after the join, beyond what it was before. Then it forks, as
torch's loader does, and the worker looks at samples in a shuffled order: what pages of its own that takes, beyond a
worker that does nothing, is what each worker adds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SAMPLES_A_SHARD = 10_000
TEACHER = {"name": "", "num_layers": 32, "num_heads": 32, "hidden_size": 4096, "num_vision_tokens": 144,
           "vocab_size": 32000}  # fmt: skip
LOOKED_AT = 0.5  # of the samples, by the worker


def join_memory(num_samples: int) -> dict[str, float]:
    """Bytes and seconds of the join of so many made-up samples, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), num_samples)
        command = [sys.executable, __file__, folder]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def described_join(found: dict[str, float]) -> str:
    """One line for people."""
    return (
        f"{found['samples']:,.0f} samples: joined in {found['cpu_seconds']:.1f} CPU seconds; "
        f"{found['bytes_a_sample']:.0f} bytes a sample in the process, at most {found['peak_bytes_a_sample']:.0f}; "
        f"{found['worker_bytes_a_sample']:.1f} more in each worker that looked at {LOOKED_AT:.0%} of them, "
        f"{1e6 * found['cpu_seconds_a_look']:.0f} us of CPU each"
    )


def write_store(folder: Path, num_samples: int) -> None:
    """Empty shards, and a store that has an index of each."""
    from cache import FORMAT_VERSION, ArraySpec, Fingerprint, Manifest, StoreWriter
    from cache.format.documents import document_bytes
    from cache.format.index import PartIndex
    from cache.format.records import Counts, PartRecord

    starts = range(0, num_samples, SAMPLES_A_SHARD)
    parts = tuple(f"shard-{number:06d}" for number in range(len(starts)))
    of_text = {name: ArraySpec(name, "T", (), "sample", "integer", {"dtype": "int32"}) for name in (
        "input_ids", "labels", "attention/layer_0", "logits/ids", "logits/values", "logits/tail"
    )}  # fmt: skip
    vision = ArraySpec("vision", "I D", (8,), "image", "float32", {})
    manifest = Manifest(FORMAT_VERSION, Fingerprint("1", "2", "3", "4", "5"), (*of_text.values(), vision),
                        TEACHER, {}, {}, parts)  # fmt: skip
    store = StoreWriter.open(folder / "store", manifest).path
    (folder / "shards").mkdir()
    for start, part in zip(starts, parts, strict=True):
        (folder / "shards" / f"{part}.tar").touch()
        entries = [_entry(number) for number in range(start, min(start + SAMPLES_A_SHARD, num_samples))]
        counts = [100 + n % 37 for n in range(len(entries))]
        index = PartIndex.of(
            entries, [e.images[0] for e in entries], row_counts=dict.fromkeys(of_text, counts)
        )
        n = len(entries)
        record = PartRecord(part, manifest.contents_digest(), {}, Counts(n, n, 0, n, n), None, {})
        (store / "parts" / part).mkdir()
        (store / "parts" / part / "index.json").write_bytes(document_bytes(index.to_json()))
        (store / "parts" / part / "part.json").write_bytes(document_bytes(record.to_json()))


def _entry(number: int) -> Any:
    from cache import SampleEntry, Span

    key, place = f"{number:09d}", 512 + number % SAMPLES_A_SHARD * 90_112
    digest = hashlib.blake2b(key.encode(), digest_size=32).hexdigest()
    images = (Span(f"{key}.jpg", place, 80_000 + number % 977),)
    return SampleEntry(key, (digest,), images, Span(f"{key}.json", place + 81_920, 900 + number % 311))


def measure(folder: Path) -> dict[str, float]:
    """The join of the store, as stage 2 makes it, and a forked worker that looks at samples."""
    from cache import Store
    from pipeline.distill.join.dataset import JoinedDataset

    nothing: Any = None  # no text is tokenised
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    before, started = _status("VmRSS"), time.process_time()
    dataset = JoinedDataset(Store(folder / "store"), str(folder / "shards"), nothing, targets={})
    store = dataset.stores.opened[0]
    len(store)  # the look-up by key is made, as by the first sample that is read
    seconds, peak = time.process_time() - started, _status("VmHWM")
    gc.collect()
    held, samples = _status("VmRSS") - before, len(dataset)
    order = random.Random(0).sample(range(samples), int(LOOKED_AT * samples))

    def look() -> float:
        started = time.process_time()
        for number in order:
            _, entry = dataset.rows[number]
            store.locate(entry.key)
        return (time.process_time() - started) / len(order)

    _, nothing_done = _in_worker(lambda: sum(order) * 0.0)
    seconds_a_look, copied = _in_worker(look)
    return {
        "samples": samples,
        "cpu_seconds": seconds,
        "bytes_a_sample": held / samples,
        "peak_bytes_a_sample": (peak - before) / samples,
        "worker_bytes_a_sample": (copied - nothing_done) / samples,
        "cpu_seconds_a_look": seconds_a_look,
    }


def _in_worker(work: Callable[[], float]) -> tuple[float, float]:
    """What a forked process answers, and the bytes of its pages that are no longer the parent's."""
    reading, writing = os.pipe()
    if not os.fork():
        answer = work()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))
        os.write(writing, json.dumps([answer, own]).encode())
        os._exit(0)
    os.wait()
    answer, own = json.loads(os.read(reading, 1000))
    return answer, own


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
