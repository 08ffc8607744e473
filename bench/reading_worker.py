"""One contestant of `bench/reading.py`, in a process and an environment of its own: writes, checks or reads samples.

python bench/reading_worker.py ACTION CONTESTANT FOLDER REQUEST

ACTION is `write`, `check` or `read`, REQUEST a JSON object; the answer is the last line printed, a JSON object. Needs
numpy, safetensors and the contestant's own package; nothing of this repository but for the contestant `ours`.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

Arrays = dict[str, np.ndarray]
SHUFFLE_BUFFER = 64  # samples, WebDataset's
BATCH = 8  # samples that a training process asks the store for at once
CHUNK_BYTES = 64 * 1024**2  # litdata's and MDS's files


def main() -> int:
    action, contestant, folder, request = sys.argv[1:]
    answer = {"write": _write, "check": _check, "read": _read}[action]
    print(json.dumps(answer(contestant, Path(folder), json.loads(request))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some leave threads behind that would have to time out


def _write(contestant: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Put the blobs, each a sample's codes as safetensors, into the contestant's own files."""
    blobs = sorted(Path(request["samples"]).glob("*.safetensors"))
    folder.mkdir(parents=True)
    WRITERS[contestant](folder, (blob.read_bytes() for blob in blobs), request)
    return {"bytes": sum(file.stat().st_size for file in _files(folder))}


def _check(contestant: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Sum of checksums over all samples, equal for all that hold the same codes."""
    samples = _open(contestant, folder, request, as_floats=False)
    sums = [zlib.crc32(name.encode() + a.tobytes()) for sample in samples for name, a in sample.items()]
    return {"arrays": len(sums), "sum": sum(sums)}


def _read(contestant: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds, and bytes read, of a pass over the samples with cold files and one with warm files.

    Who asks for it has made the system drop the files. The contestant is opened anew for each, before the clock runs:
    nothing but the system's memory is warm.
    """
    return {which: _timed(contestant, folder, request) for which in ("cold", "warm")}


def _timed(contestant: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    samples = _open(contestant, folder, request, as_floats=request["as_floats"])
    before, started, cpu_started = _read_so_far(), time.perf_counter(), time.process_time()
    sizes = [sum(array.nbytes for array in sample.values()) for sample in samples]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    asked, from_disk = (now - then for now, then in zip(_read_so_far(), before, strict=True))
    del samples
    gc.collect()
    return {"samples": len(sizes), "seconds": seconds, "cpu_seconds": cpu_seconds,
            "delivered_bytes": sum(sizes), "asked_bytes": asked,
            "disk_bytes": from_disk}  # fmt: skip


def _open(contestant: str, folder: Path, request: dict[str, Any], *, as_floats: bool) -> Iterator[Arrays]:
    indices = request["indices"]
    if contestant.startswith("ours"):
        return _ours(folder, indices, cache_bytes=request.get("cache_bytes"), as_floats=as_floats)
    blobs = READERS[contestant](folder, indices, request.get("seed", 0))
    codes = (load(blob) for blob in islice(blobs, len(indices)))
    return (_floats(sample, request["step"]) for sample in codes) if as_floats else codes


def _floats(codes: Arrays, step: float) -> Arrays:
    """The arithmetic of the store's codecs."""
    return {
        "input_ids": codes["input_ids"],
        "labels": codes["labels"],
        "attention/layer_0": _from_roots(codes["attention/layer_0"], codes["attention/layer_0_scale"]),
        "vision": _from_steps(codes["vision"], step),
        "logits/ids": codes["logits/ids"],
        "logits/log_probs": codes["logits/log_probs"].astype(np.float32),
        "logits/tail": codes["logits/tail"].astype(np.float32),
    }


def _from_steps(codes: np.ndarray, step: float) -> np.ndarray:
    values = codes.astype(np.float32)
    values *= np.float32(step)
    return values


def _from_roots(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = codes.astype(np.float32)
    values /= np.float32(255)
    values *= values * scale.astype(np.float32)[..., None]
    return values


def _ours(
    folder: Path, indices: Sequence[int], *, cache_bytes: int | None, as_floats: bool
) -> Iterator[Arrays]:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import cache.read.reader as reader

    if not as_floats:
        reader.decode_rows = lambda spec, stored: stored  # what is stored, by suffix
    store = reader.Store(folder, **({} if cache_bytes is None else {"cache_bytes": cache_bytes}))
    keys, names = list(store.keys()), list(store.manifest.specs)
    batches = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
    arrays = (
        sample for batch in batches for sample in store.read_many([keys[index] for index in batch], names)
    )
    return arrays if as_floats else (_named(sample) for sample in arrays)


def _named(sample: dict[str, Any]) -> Arrays:
    """Codes by the name that they are stored under."""
    return {
        f"{name}_{suffix}" if suffix else name: codes
        for name, stored in sample.items()
        for suffix, codes in stored.items()
    }


def _write_webdataset(folder: Path, blobs: Iterator[bytes], request: dict[str, Any]) -> None:
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=request["shard_samples"], verbose=0) as tar:
        for number, blob in enumerate(blobs):
            tar.write({"__key__": f"{number:06d}", "safetensors": blob})


def _read_webdataset(folder: Path, indices: Sequence[int], seed: int) -> Iterator[bytes]:
    """Shards in shuffled order, each from its beginning to its end, through a shuffle buffer: it has no index."""
    import webdataset

    shards = [str(shard) for shard in sorted(folder.glob("*.tar"))]
    random.Random(seed).shuffle(shards)
    # As few as hold so many samples, so that none is read in part.
    shards = shards[: max(1, len(indices) * len(shards) // _num_samples(folder))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).shuffle(SHUFFLE_BUFFER, seed=seed)
    return (sample["safetensors"] for sample in samples)


def _num_samples(folder: Path) -> int:
    return int((folder.parent / "num_samples").read_text())


def _write_lmdb(folder: Path, blobs: Iterator[bytes], request: dict[str, Any]) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 40) as environment:
        for number, blob in enumerate(blobs):
            with environment.begin(write=True) as transaction:
                transaction.put(b"%06d" % number, blob)


def _read_lmdb(folder: Path, indices: Sequence[int], seed: int) -> Iterator[bytes]:
    import lmdb

    transaction = lmdb.open(str(folder), readonly=True, lock=False).begin()
    return (transaction.get(b"%06d" % index) for index in indices)


def _write_arrow(folder: Path, blobs: Iterator[bytes], request: dict[str, Any]) -> None:
    import pyarrow

    schema = pyarrow.schema([("sample", pyarrow.large_binary())])
    with pyarrow.ipc.new_file(str(folder / "samples.arrow"), schema) as file:
        while batch := list(islice(blobs, 32)):
            file.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.large_binary())], schema))


def _read_arrow(folder: Path, indices: Sequence[int], seed: int) -> Iterator[bytes]:
    import pyarrow

    column = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "samples.arrow"))).read_all()["sample"]
    return (column[index].as_py() for index in indices)


def _write_litdata(folder: Path, blobs: Iterator[bytes], request: dict[str, Any]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, blob in enumerate(blobs):
        writer.add_item(number, {"sample": blob})
    writer.done()
    writer.merge(1)


def _read_litdata(folder: Path, indices: Sequence[int], seed: int) -> Iterator[bytes]:
    """By its own shuffle."""
    from litdata import StreamingDataset

    samples = iter(StreamingDataset(str(folder), shuffle=True, seed=seed))
    return (bytes(sample["sample"]) for sample in samples)


def _write_mds(folder: Path, blobs: Iterator[bytes], request: dict[str, Any]) -> None:
    streaming = _streaming()
    with streaming.MDSWriter(
        out=str(folder), columns={"sample": "bytes"}, size_limit=CHUNK_BYTES, exist_ok=True
    ) as out:
        for blob in blobs:
            out.write({"sample": blob})


def _read_mds(folder: Path, indices: Sequence[int], seed: int) -> Iterator[bytes]:
    """By number, its fastest way."""
    samples = _streaming().StreamingDataset(local=str(folder), batch_size=1)
    return (samples[index]["sample"] for index in indices)


def _streaming() -> Any:
    """The package; without torchvision, which it imports for data sets of images, where that does not fit torch."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = types.ModuleType(f"torchvision{name}")
            module.__getattr__ = _any_class
            module.__spec__ = ModuleSpec(module.__name__, None)
            sys.modules[module.__name__] = module
    import streaming

    return streaming


def _any_class(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


WRITERS: dict[str, Callable[[Path, Iterator[bytes], dict[str, Any]], None]] = {
    "webdataset": _write_webdataset,
    "lmdb": _write_lmdb,
    "arrow": _write_arrow,
    "litdata": _write_litdata,
    "mds": _write_mds,
}
READERS: dict[str, Callable[[Path, Sequence[int], int], Iterator[bytes]]] = {
    "webdataset": _read_webdataset,
    "lmdb": _read_lmdb,
    "arrow": _read_arrow,
    "litdata": _read_litdata,
    "mds": _read_mds,
}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _read_so_far() -> tuple[int, int]:
    """Bytes that this process asked for with read calls, and bytes that the disk gave it, mapped files included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["read_bytes"])


if __name__ == "__main__":
    sys.exit(main())
