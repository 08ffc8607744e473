"""Reads a store in shuffled order beside other formats that hold the same arrays: samples a second, bytes a sample.

python bench/reading.py                        600 samples in MobileVLM V2's shapes, five repeats, all peers
python bench/reading.py --peers webdataset     ours and one peer
python bench/reading.py --peers none --quick   small shapes, ours alone

Values are synthetic. A peer holds a sample as the integer codes that the store keeps, uncompressed, in one
safetensors blob, and has an environment of its own, made with pip below --environments. One process reads.
Contestants take turns within every repeat, each in a new process, with other samples in every repeat. `codes`: as
stored; `float32`: as training gets them. Cold: the system's memory holds nothing of the files. Warm: it holds all of
them, the contestant nothing. `ours` asks for batches of 8 and keeps no chunk between them, as if the store were so
large that none is met twice. What cannot be installed or run is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from reading_samples import SIZES, VISION_STEP, Size, write_samples
from reading_table import MODES, OURS, WINDOWS, bars, summary, table

from cache import Store, drop_from_memory
from cache.format.codecs import stored_arrays

WORKER = Path(__file__).parent / "reading_worker.py"
# Peer -> what pip installs for it. MDS needs an older numpy, and two of them torch, which they would replace.
PEERS = {
    "webdataset": ["webdataset==1.0.2", "safetensors==0.8.0", "numpy==2.4.6"],
    "lmdb": ["lmdb==3.0.0", "safetensors==0.8.0", "numpy==2.4.6"],
    "arrow": ["pyarrow==26.0.1", "safetensors==0.8.0", "numpy==2.4.6"],
    "litdata": ["litdata==0.2.76", "torch==2.13.0", "torchvision==0.28.0", "safetensors==0.8.0"],
    "mds": ["mosaicml-streaming==0.13.0", "torch==2.13.0", "torchvision==0.28.0", "safetensors==0.8.0"],
}
WINDOW_SAMPLES = 32


class CannotRunError(Exception):
    """A contestant's process ended with an error, told by its last line."""


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = run(options, Path(folder))
    print(table(figures))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    size, number = SIZES[options.size], options.samples
    _say(f"writing {number} samples")
    write_samples(folder, size, number)
    pythons, absent = {OURS: sys.executable, WINDOWS: sys.executable}, {}
    expected = _ask(
        sys.executable, "check", OURS, folder, {"indices": list(range(number)), "cache_bytes": None}
    )
    for peer in options.peers:
        _say(f"{peer}: environment, files")
        try:
            pythons[peer] = _prepared(
                peer, folder, size, number, environments=options.environments, expected=expected
            )
        except CannotRunError as error:
            absent[peer] = str(error)
    readings = list(_readings(pythons, folder, size, number, options=options))
    contestants = [summary(name, readings) for name in pythons]
    return {
        "values": "synthetic",
        "size": options.size,
        "samples": number,
        "samples_read": options.reads,
        "repeats": options.repeats,
        "sample_bytes": statistics.mean(_blob_sizes(folder)),
        "checked": expected,
        "contestants": contestants,
        "absent": absent,
        "bars": bars(contestants),
        "readings": readings,
    }


def _prepared(
    peer: str, folder: Path, size: Size, number: int, *, environments: Path, expected: dict[str, Any]
) -> str:
    """The interpreter of a peer whose files are written and hold what ours hold."""
    python = _environment(peer, environments)
    request = {"samples": str(folder / "samples"), "shard_samples": size.part_samples // 2}
    _ask(python, "write", peer, folder, request)
    found = _ask(python, "check", peer, folder, {"indices": list(range(number))})
    if found != expected:
        raise CannotRunError(f"it gives back {found}, ours {expected}")
    return python


def _environment(peer: str, environments: Path) -> str:
    """The interpreter of a virtual environment with what the peer needs, made if it is not there."""
    folder = environments / peer
    done, python = folder / "installed.json", str(folder / "bin" / "python")
    if not done.exists() or json.loads(done.read_text()) != PEERS[peer]:
        _process([sys.executable, "-m", "venv", str(folder)])
        _process([python, "-m", "pip", "install", "--quiet", *PEERS[peer]])
        done.write_text(json.dumps(PEERS[peer]))
    return python


def _readings(
    pythons: dict[str, str], folder: Path, size: Size, number: int, *, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each repeat, contestant, mode, and state of the files; every other repeat is in reverse."""
    used = used_bytes(folder / OURS)
    blob_bytes = _blob_sizes(folder)
    for repeat in range(options.repeats):
        order = list(pythons)[:: 1 if repeat % 2 == 0 else -1]
        for name in order:
            indices = _order(name, number, options.reads, seed=repeat, part_samples=size.part_samples)
            for mode, as_floats in MODES.items():
                _say(f"repeat {repeat + 1} of {options.repeats}: {name}, {mode}")
                request = {"indices": indices, "seed": repeat, "as_floats": as_floats, "step": VISION_STEP,
                           "cache_bytes": 0 if name == OURS else None}  # fmt: skip
                drop_from_memory(folder / _contestant(name))
                found = _ask(pythons[name], "read", name, folder, request)
                sizes = used if name in (OURS, WINDOWS) else blob_bytes
                # What shuffles by itself read other samples than these, whose sizes are the same in the mean.
                needed = sum(sizes[index] for index in indices) / len(indices)
                for files, figures in found.items():
                    yield {"contestant": name, "repeat": repeat, "mode": mode, "files": files,
                           "used_bytes": needed * figures["samples"], **figures}  # fmt: skip


def _order(name: str, number: int, reads: int, *, seed: int, part_samples: int) -> list[int]:
    """Distinct samples in an order without order, or in windows of neighbours in one part."""
    chance = random.Random(seed)
    if name != WINDOWS:
        return chance.sample(range(number), reads)
    windows = [
        list(range(start, min(start + WINDOW_SAMPLES, part + part_samples, number)))
        for part in range(0, number, part_samples)
        for start in range(part, min(part + part_samples, number), WINDOW_SAMPLES)
    ]
    chance.shuffle(windows)
    for window in windows:
        chance.shuffle(window)
    return [index for window in windows for index in window][:reads]


def used_bytes(store_folder: Path) -> list[float]:
    """Of every sample its rows' share of the chunks that they lie in, as stored."""
    store, used = Store(store_folder), []
    for name in store.parts:
        part = store._part(name)
        wanted = [(spec, stored) for spec in store.manifest.arrays for stored in stored_arrays(spec)]
        arrays = part.arrays(wanted)
        for sample in range(len(part.index.keys)):
            spans = [part.index.row_spans(sample, spec) for spec, _ in wanted]
            used.append(
                sum(_share(array, *span) for array, of in zip(arrays, spans, strict=True) for span in of)
            )
    return used


def _share(array: Any, start: int, stop: int) -> float:
    """Bytes of the rows start..stop if each row of a chunk takes as many."""
    total = 0.0
    for chunk in range(start // array.chunk_rows, (stop - 1) // array.chunk_rows + 1):
        first = chunk * array.chunk_rows
        last = min(first + array.chunk_rows, array.num_rows)
        total += int(array.spans[chunk][1]) * (min(stop, last) - max(start, first)) / (last - first)
    return total


def _blob_sizes(folder: Path) -> list[int]:
    return [file.stat().st_size for file in sorted((folder / "samples").iterdir())]


def _contestant(name: str) -> str:
    """Whose files it reads."""
    return OURS if name == WINDOWS else name


def _ask(python: str, action: str, name: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    contestant = _contestant(name)
    command = [python, str(WORKER), action, contestant, str(folder / contestant), json.dumps(request)]
    return json.loads(_process(command).splitlines()[-1])


def _process(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise CannotRunError(lines[-1])
    return done.stdout


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, help="written: 600, or 48 of the small size")
    parser.add_argument("--reads", type=int, help="samples of a pass: a third of them")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, "none"], default=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="the small size, two repeats")
    parser.add_argument("--environments", type=Path, default=ROOT / "runs" / "bench_environments")
    parser.add_argument(
        "--folder", type=Path, help="where files are written for the time of the run; else TMPDIR"
    )
    parser.add_argument("--output", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args()
    if options.quick:
        options.size, options.repeats = "small", 2
    options.samples = options.samples or (600 if options.size == "full" else 48)
    options.reads = options.reads or options.samples // 3
    options.peers = [peer for peer in options.peers if peer != "none"]
    return options


if __name__ == "__main__":
    sys.exit(main())
