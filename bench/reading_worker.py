"""One contestant of bench/reading.py, in a process and an environment of its own: writes, checks or reads samples.

python -m bench.reading_worker ACTION CONTESTANT FOLDER REQUEST

ACTION is `write`, `check` or `read`, REQUEST a JSON object; the answer is the last line printed, a JSON value. Needs
numpy, safetensors and the contestant's own package. A sample is a safetensors blob of its codes.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from bench.processes import counters

Arrays = dict[str, np.ndarray]
Request = dict[str, Any]
SHUFFLE_BUFFER = 64  # samples, WebDataset's
BATCH = 8  # samples that a training process asks the store for at once
CHUNK_BYTES = 64 * 1024**2  # litdata's and MDS's files
VISION_STEP = 2.0**-7  # the target's default


def write(contestant: str, folder: Path, request: Request) -> None:
    """Put the blobs below request["samples"] into the contestant's own files."""
    folder.mkdir(parents=True)
    blobs = (blob.read_bytes() for blob in sorted(Path(request["samples"]).iterdir()))
    globals()[f"write_{contestant}"](folder, blobs, request)


def check(contestant: str, folder: Path, request: Request) -> list[int]:
    """Number and sum of the checksums of all arrays, equal for all that hold the same codes."""
    samples = _samples(contestant, folder, request)
    sums = [zlib.crc32(name.encode() + a.tobytes()) for sample in samples for name, a in sample.items()]
    return [len(sums), sum(sums)]


def read(contestant: str, folder: Path, request: Request) -> dict[str, dict[str, float]]:
    """Time a pass over the samples with cold files (the caller made the system drop them), then one with warm files.

    The contestant is opened anew for each, before the clock runs: nothing but the system's memory is warm.
    """
    return {files: _timed(_samples(contestant, folder, request)) for files in ("cold", "warm")}


def _timed(samples: Iterator[Arrays]) -> dict[str, float]:
    before, started, cpu_started = counters("io"), time.perf_counter(), time.process_time()
    sizes = [sum(array.nbytes for array in sample.values()) for sample in samples]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    after = counters("io")
    return {
        "samples_a_second": len(sizes) / seconds,
        "cpu_ms": 1e3 * cpu_seconds / len(sizes),
        "delivered": sum(sizes) / len(sizes),
        "asked": (after["rchar"] - before["rchar"]) / len(sizes),
        "from_disk": (after["read_bytes"] - before["read_bytes"]) / len(sizes),  # mapped files included
    }


def _samples(contestant: str, folder: Path, request: Request) -> Iterator[Arrays]:
    if contestant == "ours":
        return read_ours(folder, request)
    blobs = globals()[f"read_{contestant}"](folder, request["indices"], request)
    codes = (load(blob) for blob in islice(blobs, len(request["indices"])))
    return map(as_floats, codes) if request["as_floats"] else codes


def as_floats(codes: Arrays) -> Arrays:
    """What the store's codecs would decode from the codes."""
    roots, vision = codes["attention/layer_0"].astype(np.float32), codes["vision"].astype(np.float32)
    roots /= np.float32(255)
    roots *= roots * codes["attention/layer_0_scale"].astype(np.float32)[..., None]
    vision *= np.float32(VISION_STEP)
    floats = {name: codes[name].astype(np.float32) for name in ("logits/log_probs", "logits/tail")}
    same = {name: codes[name] for name in ("input_ids", "labels", "logits/ids")}
    return same | floats | {"attention/layer_0": roots, "vision": vision}


def read_ours(folder: Path, request: Request) -> Iterator[Arrays]:
    """Batches of samples; `cache_bytes` of chunks are kept between them, the store's default if None."""
    import cache.read.reader as reader

    if not request["as_floats"]:
        reader.decode_rows = lambda spec, stored: stored  # what is stored, by suffix
        reader.decode_blocks = lambda spec, stored, shapes: stored
    cache_bytes = request["cache_bytes"]
    store = reader.Store(folder, **({} if cache_bytes is None else {"cache_bytes": cache_bytes}))
    keys, names = list(store.keys()), list(store.manifest.specs)
    wanted = [keys[index] for index in request["indices"]]
    batches = (wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH))
    samples = (sample for batch in batches for sample in store.read_many(batch, names))
    return map(_plain if request["as_floats"] else _named, samples)


def _plain(sample: dict[str, Any]) -> Arrays:
    """A ragged array as the block of the sample's one image."""
    return {name: array[0] if isinstance(array, list) else array for name, array in sample.items()}


def _named(sample: dict[str, Any]) -> Arrays:
    """Codes by the name that they are stored under."""
    codes = ((name, suffix, array) for name, stored in sample.items() for suffix, array in stored.items())
    return {f"{name}_{suffix}" if suffix else name: array for name, suffix, array in codes}


def write_webdataset(folder: Path, blobs: Iterator[bytes], request: Request) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=request["shard_samples"], verbose=0) as tar:
        for number, blob in enumerate(blobs):
            tar.write({"__key__": f"{number:06d}", "safetensors": blob})


def read_webdataset(folder: Path, indices: list[int], request: Request) -> Iterator[bytes]:
    """Shards in shuffled order, each from its beginning to its end, through a shuffle buffer: it has no index."""
    import webdataset

    shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
    random.Random(request["seed"]).shuffle(shards)
    # As few as hold so many samples, so that none is read in part.
    shards = shards[: -(-len(indices) // request["shard_samples"])]
    samples = webdataset.WebDataset(shards, shardshuffle=False).shuffle(SHUFFLE_BUFFER, seed=request["seed"])
    return (sample["safetensors"] for sample in samples)


def write_lmdb(folder: Path, blobs: Iterator[bytes], request: Request) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 40) as environment:
        for number, blob in enumerate(blobs):
            with environment.begin(write=True) as transaction:
                transaction.put(b"%06d" % number, blob)


def read_lmdb(folder: Path, indices: list[int], request: Request) -> Iterator[bytes]:
    import lmdb

    transaction = lmdb.open(str(folder), readonly=True, lock=False).begin()
    return (transaction.get(b"%06d" % index) for index in indices)


def write_arrow(folder: Path, blobs: Iterator[bytes], request: Request) -> None:
    import pyarrow

    schema = pyarrow.schema([("sample", pyarrow.large_binary())])
    with pyarrow.ipc.new_file(str(folder / "samples.arrow"), schema) as file:
        while batch := list(islice(blobs, 32)):
            file.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.large_binary())], schema))


def read_arrow(folder: Path, indices: list[int], request: Request) -> Iterator[bytes]:
    import pyarrow

    column = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "samples.arrow"))).read_all()["sample"]
    return (column[index].as_py() for index in indices)


def write_litdata(folder: Path, blobs: Iterator[bytes], request: Request) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, blob in enumerate(blobs):
        writer.add_item(number, {"sample": blob})
    writer.done()
    writer.merge(1)


def read_litdata(folder: Path, indices: list[int], request: Request) -> Iterator[bytes]:
    """By its own shuffle."""
    from litdata import StreamingDataset

    samples = iter(StreamingDataset(str(folder), shuffle=True, seed=request["seed"]))
    return (bytes(sample["sample"]) for sample in samples)


def write_mds(folder: Path, blobs: Iterator[bytes], request: Request) -> None:
    import streaming

    columns = {"sample": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES, exist_ok=True) as out:
        for blob in blobs:
            out.write({"sample": blob})


def read_mds(folder: Path, indices: list[int], request: Request) -> Iterator[bytes]:
    """By number, its fastest way."""
    import streaming

    samples = streaming.StreamingDataset(local=str(folder), batch_size=1)
    return (samples[index]["sample"] for index in indices)


if __name__ == "__main__":
    action, contestant, folder, request = sys.argv[1:]
    print(json.dumps(globals()[action](contestant, Path(folder), json.loads(request))), flush=True)
    os._exit(0)  # some leave threads behind that would have to time out
