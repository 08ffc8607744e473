"""Kills stage 1 at random moments and fails its disk at random calls; a rerun must end with the undisturbed store.

    python tests/faults.py --trials 200

Each trial is a new store: a forked process caches three small shards and meets one fault. The parts that it leaves
are counted, and a second, undisturbed process runs the same. Then the content hash must be that of a store that met
no fault, and `verify --deep` must find nothing. Needs `cc`, for the failing disk.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PRELOADED = "ALIGNKD_FAILING_DISK"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a signal, a system call that fails from its n-th use on, or memory that is not there once."""

    name: str
    signal: int = 0
    operation: str = ""
    error: int = 0
    half: bool = False


@dataclass
class Result:
    """What the trials of a fault came to; `parts_left` counts the parts that it left."""

    fault: Fault
    trials: int = 0
    met: int = 0
    parts_left: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


FAULTS = (
    Fault("SIGKILL", signal=signal.SIGKILL),
    Fault("SIGTERM", signal=signal.SIGTERM),
    Fault("disk full", operation="write", error=errno.ENOSPC),
    Fault("disk full, short write", operation="write", error=errno.ENOSPC, half=True),
    Fault("fsync fails", operation="fsync", error=errno.EIO),
    Fault("rename fails", operation="rename", error=errno.EIO),
    Fault("shard unreadable", operation="read", error=errno.EIO),
    Fault(OUT_OF_MEMORY),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as folder:
        if PRELOADED not in os.environ:
            return _preloaded(Path(folder))
        results = run(trials, Path(folder))
    print_results(results)
    return 1 if any(result.wrong for result in results) else 0


def run(trials: int, folder: Path) -> list[Result]:
    """Trials go round the faults."""
    experiment, chance = _experiment(folder), random.Random(0)
    undisturbed, seconds, calls = _undisturbed(experiment, folder / "undisturbed")
    results = [Result(fault) for fault in FAULTS]
    for trial in range(trials):
        result, store = results[trial % len(FAULTS)], folder / f"store-{trial}"
        moment = chance.random()
        number = 1 + int(moment * calls.get(result.fault.operation, 6))
        status = _disturbed(experiment, store, result.fault, moment * seconds, number)
        result.trials += 1
        result.met += status != 0 or result.fault.name == OUT_OF_MEMORY
        result.parts_left[len(list(store.glob("parts/*/part.json")))] += 1
        found = _in_child(lambda store=store: _finish(experiment, store))
        if found != undisturbed:
            result.wrong.append(f"trial {trial}, call {number}, moment {moment}: {found}")
        shutil.rmtree(store)
    return results


def print_results(results: list[Result]) -> None:
    from bench.tables import print_table

    print_table([
        {
            "fault": result.fault.name,
            "trials": result.trials,
            "met": result.met,
            "parts left then": ", ".join(f"{n}: {times}" for n, times in sorted(result.parts_left.items())),
            "store not the undisturbed one": len(result.wrong),
        }
        for result in results
    ])  # fmt: skip
    for result in results:
        for wrong in result.wrong:
            print(f"{result.fault.name}: {wrong}")
    totals = [sum(column) for column in zip(*((r.trials, r.met, len(r.wrong)) for r in results), strict=True)]
    print("{} trials, {} met their fault, {} wrong".format(*totals))


def _experiment(folder: Path) -> Any:
    """Three small shards and a small teacher; nothing of it opens a Zarr array, so that forks are sound."""
    from small_experiment import build_experiment
    from small_models import tiny_model

    return build_experiment(folder / "experiment", tiny_model)


def _undisturbed(experiment: Any, store: Path) -> tuple[str, float, dict[str, int]]:
    """Content hash, seconds that caching takes, and how often each operation is called."""

    def cache(operation: str, below: Path) -> str:
        _arm(Fault("", operation=operation), below, sys.maxsize >> 33)
        started = time.monotonic()
        _cache(experiment, store)
        calls = _disk().disk_calls()
        return json.dumps([time.monotonic() - started, calls])

    calls, seconds = {}, 0.0
    for operation in ("write", "fsync", "rename", "read"):
        shutil.rmtree(store, ignore_errors=True)
        below = experiment.shards if operation == "read" else store
        seconds, calls[operation] = json.loads(_in_child(lambda o=operation, b=below: cache(o, b)))
    return _in_child(lambda: _finish(experiment, store)), seconds, calls


def _disturbed(experiment: Any, store: Path, fault: Fault, seconds: float, number: int) -> int:
    """Cache in a process that meets the fault; its wait status."""
    process = os.fork()
    if not process:
        _silence()
        if fault.operation:
            _arm(fault, experiment.shards if fault.operation == "read" else store, number)
        elif not fault.signal:
            _run_out_of_memory(number)
        try:
            _cache(experiment, store)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if fault.signal:
        time.sleep(seconds)
        os.kill(process, fault.signal)
    return os.waitpid(process, 0)[1]


def _finish(experiment: Any, store: Path) -> str:
    """Run the same again, undisturbed; the content hash, or what is wrong with the store."""
    from cache import summarise, verify

    _cache(experiment, store)
    problems = verify(store, deep=True).problems
    return "; ".join(f"{p.file}: {p.detail}" for p in problems) or summarise(store).content


def _cache(experiment: Any, store: Path) -> None:
    from pipeline.config.config import load_config
    from pipeline.teacher_cache.teacher import cache_teacher

    cache_teacher(load_config(experiment.file, [f"cache.path={store}"]))


def _run_out_of_memory(call: int) -> None:
    """Let the n-th of the teacher's forward passes find no memory, once."""
    import torch

    from pipeline.models.stub import Teacher

    forward, calls = Teacher.forward, Counter[str]()

    def once(self: Any, *arguments: Any, **named: Any) -> Any:
        calls["forward"] += 1
        if calls["forward"] == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *arguments, **named)

    Teacher.forward = once


def _in_child(work: Callable[[], str]) -> str:
    """What `work` returns, from a process of its own; its exception if it raises."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        _silence()
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    return text


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _disk() -> Any:
    return ctypes.CDLL(os.environ[PRELOADED])


def _arm(fault: Fault, below: Path, number: int) -> None:
    _disk().arm_disk(fault.operation.encode(), str(below).encode(), number, fault.error, int(fault.half))


def _preloaded(folder: Path) -> int:
    """Run this script with the failing disk preloaded."""
    library = folder / "failing_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "failing_disk.c", "-ldl"], check=True)
    environment = os.environ | {
        PRELOADED: str(library), "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
