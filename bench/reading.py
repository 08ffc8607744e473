"""Reads a store in shuffled order beside other formats that hold the same arrays: samples a second, bytes a sample.

python -m bench.reading                          600 samples in MobileVLM V2's shapes, five repeats, all peers
python -m bench.reading --peers webdataset,lmdb
python -m bench.reading --shapes mixed           images of 64 to 1,024 vision tokens

Values are synthetic. A peer holds a sample as the integer codes that the store keeps, uncompressed, in one
safetensors blob, and has an environment of its own below runs/. One process reads a third of the samples. In every
repeat the contestants take turns, each in a new process, with other samples than before. `codes`: as stored;
`float32`: as training gets them. Cold: the system's memory holds nothing of the files. Warm: it holds all of them,
the contestant nothing. `ours` keeps no chunk between batches, as in a store so large that none is met twice.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer
from safetensors.numpy import save

from bench.synthetic import SIZES, Arrays, Size, add_sample, manifest, rows_of, samples
from bench.tables import print_table
from cache import StoreWriter, drop_from_memory, part_sizes
from cache.format.codecs import encode_rows, stored_arrays

OURS, WINDOWS, WINDOW_SAMPLES = "ours", "ours, windows of 32", 32
MODES = {"codes": False, "float32": True}
ENVIRONMENTS = Path("runs/bench_environments")
# What pip installs for a peer. MDS needs an older numpy, and two of them torch, which they would replace.
PEERS = {
    "webdataset": ["webdataset==1.0.2", "safetensors==0.8.0", "numpy==2.4.6"],
    "lmdb": ["lmdb==3.0.0", "safetensors==0.8.0", "numpy==2.4.6"],
    "arrow": ["pyarrow==26.0.1", "safetensors==0.8.0", "numpy==2.4.6"],
    "litdata": ["litdata==0.2.76", "torch==2.13.0", "torchvision==0.28.0", "safetensors==0.8.0"],
    "mds": ["mosaicml-streaming==0.13.0", "torch==2.13.0", "torchvision==0.28.0", "safetensors==0.8.0"],
}
# What each pass gave, a dict for each repeat, by contestant, mode and state of the files.
Readings = Mapping[tuple[str, str, str], list[dict[str, float]]]
app = typer.Typer(add_completion=False)


def write_samples(folder: Path, size: Size, number: int) -> None:
    """Write the same samples twice: as `ours`, a store, and as `samples`, the codes of each in a safetensors file."""
    parts = [f"part-{place:06d}" for place in range(-(-number // size.part_samples))]
    writer, stream = StoreWriter.open(folder / OURS, manifest(size, parts)), enumerate(samples(size, number))
    (folder / "samples").mkdir()
    for name in parts:
        with writer.part(name, source={}) as part:
            for index, arrays in islice(stream, size.part_samples):
                (folder / "samples" / f"{index:09d}.safetensors").write_bytes(save(_codes(size, arrays)))
                add_sample(part, index, arrays)
            part.commit()


def _codes(size: Size, arrays: Arrays) -> dict[str, np.ndarray]:
    """What the store keeps, by the name of the Zarr array that it is kept in."""
    codes = [(spec, encode_rows(*rows_of(spec, arrays))) for spec in size.specs()]
    return {
        stored.name(spec): np.ascontiguousarray(coded[stored.suffix])
        for spec, coded in codes
        for stored in stored_arrays(spec)
    }


def environment(peer: str) -> str:
    """The interpreter of a virtual environment with what the peer needs, made if it is not there."""
    folder = ENVIRONMENTS / peer
    python = str(folder / "bin" / "python")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
        (folder / "installed").touch()
    return python


def ask(python: str, action: str, name: str, folder: Path, **request: Any) -> Any:
    """Run an action of bench/reading_worker.py; its answer."""
    files = OURS if name == WINDOWS else name
    command = [python, "-m", "bench.reading_worker", action, files, folder / files, json.dumps(request)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.splitlines()[-1])


def order(name: str, number: int, size: Size, *, seed: int) -> list[int]:
    """A third of the samples without order, or in windows of neighbours of one part, shuffled inside."""
    chance = random.Random(seed)
    if name != WINDOWS:
        return chance.sample(range(number), number // 3)
    parts = batched(range(number), size.part_samples)
    windows = [list(window) for part in parts for window in batched(part, WINDOW_SAMPLES)]
    chance.shuffle(windows)
    for window in windows:
        chance.shuffle(window)
    return list(chain.from_iterable(windows))[: number // 3]


def batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Neighbours, so many at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def prepared(peers: Sequence[str], folder: Path, size: Size, number: int) -> dict[str, str]:
    """Write everybody's files; the interpreter of each contestant, once all are known to hold the same codes."""
    write_samples(folder, size, number)
    everything = {"indices": list(range(number)), "as_floats": False, "cache_bytes": None, "seed": 0}
    everything |= {"shard_samples": size.part_samples // 2, "samples": str(folder / "samples")}
    pythons = {OURS: sys.executable, WINDOWS: sys.executable, **{peer: environment(peer) for peer in peers}}
    for peer in peers:
        ask(pythons[peer], "write", peer, folder, **everything)
    checks = {name: ask(python, "check", name, folder, **everything) for name, python in pythons.items()}
    assert len(set(map(tuple, checks.values()))) == 1, f"contestants hold different codes: {checks}"
    return pythons


def read_all(pythons: Mapping[str, str], folder: Path, size: Size, number: int, repeats: int) -> Readings:
    """Every contestant in turn, every other repeat in reverse."""
    found = defaultdict(list)
    for repeat in range(repeats):
        for name, mode in product(list(pythons)[:: 1 if repeat % 2 == 0 else -1], MODES):
            print(f"repeat {repeat + 1} of {repeats}: {name}, {mode}", file=sys.stderr, flush=True)
            drop_from_memory(folder / (OURS if name == WINDOWS else name))
            request = {"indices": order(name, number, size, seed=repeat), "seed": repeat,
                       "as_floats": MODES[mode], "cache_bytes": 0 if name == OURS else None,
                       "shard_samples": size.part_samples // 2}  # fmt: skip
            for files, figures in ask(pythons[name], "read", name, folder, **request).items():
                found[name, mode, files].append(figures)
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and greatest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def rates_table(found: Readings, mode: str, files: str) -> list[dict[str, str]]:
    """Samples a second, and the ratios of our two rates to them, repeat by repeat."""
    names = dict.fromkeys(name for name, *_ in found)
    rates = {name: [of["samples_a_second"] for of in found[name, mode, files]] for name in names}
    return [
        {
            f"{mode}, {files}": name,
            "samples/s": spread(of, 0),
            "ours over it": spread(np.divide(rates[OURS], of).tolist(), 2),
            "windows over it": spread(np.divide(rates[WINDOWS], of).tolist(), 2),
            "CPU ms, warm": f"{median(figures['cpu_ms'] for figures in found[name, mode, 'warm']):.2f}",
        }
        for name, of in rates.items()
    ]


def bytes_table(found: Readings, folder: Path, number: int) -> list[dict[str, str]]:
    """Bytes a sample: as stored, asked for by read calls, given by the disk with cold files."""
    stored = sum(sum(part.array_bytes.values()) for part in part_sizes(folder / OURS)) / number
    blobs = sum(file.stat().st_size for file in (folder / "samples").iterdir()) / number
    rows = []
    for name in dict.fromkeys(name for name, *_ in found):
        cold, warm = (
            found[name, "codes", files] + found[name, "float32", files] for files in ("cold", "warm")
        )
        rows.append({
            "bytes a sample": name,
            "used": f"{stored if name in (OURS, WINDOWS) else blobs:,.0f}",
            "asked for by read calls": f"{median(figures['asked'] for figures in cold + warm):,.0f}",
            "given by the disk, cold": f"{median(figures['from_disk'] for figures in cold):,.0f}",
        })  # fmt: skip
    return rows


@app.command(help=__doc__.splitlines()[0])
def main(samples: int = 600, repeats: int = 5, peers: str = ",".join(PEERS), shapes: str = "full") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = Path(temporary), SIZES[shapes]
        pythons = prepared([peer for peer in peers.split(",") if peer], folder, size, samples)
        found = read_all(pythons, folder, size, samples, repeats)
        for mode, files in product(MODES, ("cold", "warm")):
            print_table(rates_table(found, mode, files))
        print_table(bytes_table(found, folder, samples))


if __name__ == "__main__":
    app()
