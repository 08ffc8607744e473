"""Reads a store in shuffled order beside other formats that hold the same arrays: samples a second, bytes a sample.

python -m bench.reading                          600 samples in MobileVLM V2's shapes, five repeats, all peers
python -m bench.reading --peers webdataset,lmdb

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
from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer
from safetensors.numpy import save

from bench.synthetic import SIZES, Size, add_sample, manifest, samples
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


def _codes(size: Size, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the store keeps, by the name of the Zarr array that it is kept in."""
    codes = [(spec, encode_rows(spec, arrays[spec.name])) for spec in size.specs()]
    return {
        stored.name(spec): np.ascontiguousarray(coded[stored.suffix])
        for spec, coded in codes
        for stored in stored_arrays(spec)
    }


def environment(peer: str) -> str:
    """The interpreter of a virtual environment with what the peer needs, made if it is not there."""
    folder = ENVIRONMENTS / peer
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True
        )
        (folder / "installed").touch()
    return str(folder / "bin" / "python")


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
    parts = [
        range(start, min(start + size.part_samples, number)) for start in range(0, number, size.part_samples)
    ]
    windows = [
        list(part[start : start + WINDOW_SAMPLES])
        for part in parts
        for start in range(0, len(part), WINDOW_SAMPLES)
    ]
    chance.shuffle(windows)
    for window in windows:
        chance.shuffle(window)
    return [index for window in windows for index in window][: number // 3]


def readings(
    pythons: Mapping[str, str], folder: Path, size: Size, number: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each repeat, contestant, mode and state of the files; every other repeat is in reverse."""
    found = []
    for repeat in range(repeats):
        for name in list(pythons)[:: 1 if repeat % 2 == 0 else -1]:
            for mode, as_floats in MODES.items():
                print(f"repeat {repeat + 1} of {repeats}: {name}, {mode}", file=sys.stderr, flush=True)
                drop_from_memory(folder / (OURS if name == WINDOWS else name))
                request = {"indices": order(name, number, size, seed=repeat), "seed": repeat,
                           "as_floats": as_floats, "cache_bytes": 0 if name == OURS else None,
                           "shard_samples": size.part_samples // 2}  # fmt: skip
                passes = ask(pythons[name], "read", name, folder, **request)
                found += [{"contestant": name, "mode": mode, "files": f, **row} for f, row in passes.items()]
    return found


def column_of(rows: Sequence[Mapping[str, Any]], column: str, **wanted: str) -> list[float]:
    """A column of the readings of one contestant, mode or state of the files, in the order of the repeats."""
    return [row[column] for row in rows if wanted.items() <= row.items()]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, least and greatest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def rates_table(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], mode: str, files: str
) -> list[dict[str, str]]:
    """Samples a second, and the ratios of our two rates to them, repeat by repeat."""
    rates = {
        name: column_of(rows, "samples_a_second", contestant=name, mode=mode, files=files) for name in names
    }
    table = []
    for name in names:
        ours, windows = (np.divide(rates[whose], rates[name]).tolist() for whose in (OURS, WINDOWS))
        cpu = median(column_of(rows, "cpu_ms", contestant=name, mode=mode, files="warm"))
        table.append({
            f"{mode}, {files}": name,
            "samples/s": spread(rates[name], 0),
            "ours over it": spread(ours, 2),
            "windows over it": spread(windows, 2),
            "CPU ms, warm": f"{cpu:.2f}",
        })  # fmt: skip
    return table


def bytes_table(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], folder: Path, number: int
) -> list[dict[str, str]]:
    """Bytes a sample: as stored, asked for by read calls, given by the disk with cold files."""
    stored = sum(sum(part.array_bytes.values()) for part in part_sizes(folder / OURS)) / number
    blobs = sum(file.stat().st_size for file in (folder / "samples").iterdir()) / number
    return [
        {
            "bytes a sample": name,
            "used": f"{stored if name in (OURS, WINDOWS) else blobs:,.0f}",
            "asked for by read calls": f"{median(column_of(rows, 'asked', contestant=name)):,.0f}",
            "given by the disk, cold": f"{median(column_of(rows, 'from_disk', contestant=name, files='cold')):,.0f}",
        }
        for name in names
    ]


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


@app.command(help=__doc__.splitlines()[0])
def main(samples: int = 600, repeats: int = 5, peers: str = ",".join(PEERS), small: bool = False) -> None:
    size = SIZES["small" if small else "full"]
    with tempfile.TemporaryDirectory() as folder:
        pythons = prepared([peer for peer in peers.split(",") if peer], Path(folder), size, samples)
        rows = readings(pythons, Path(folder), size, samples, repeats)
        for mode, files in product(MODES, ("cold", "warm")):
            print_table(rates_table(rows, list(pythons), mode, files))
        print_table(bytes_table(rows, list(pythons), Path(folder), samples))


if __name__ == "__main__":
    app()
