"""Contestants side by side, each in a process of its own, taking turns: what disturbs one turn disturbs all alike.

A contestant is a function without arguments that prepares once and returns its work: one turn, which returns what it
counted. Everybody's first turn warms up and is not timed. A ratio is of two turns of the same round. Peak memory is
allocated GPU memory where there is a GPU, else the resident set; `idle` is what it was before the first turn.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from bench.models import Case, Size
from bench.processes import counters, reset_peak
from bench.tables import print_table

Work = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Turn:
    seconds: float
    counted: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True)
class Turns:
    """The timed turns of one contestant; `counted` is of the last."""

    name: str
    seconds: tuple[float, ...]
    counted: Mapping[str, float]
    startup_cpu_seconds: float
    idle_bytes: int
    peak_bytes: int


def measure(contestants: Mapping[str, Callable[[], Work]], repeats: int) -> list[Turns]:
    """Return the turns of every contestant. They prepare at the same time, and take turns afterwards."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(own_process()) for name in contestants}
        preparing = [processes[name].submit(prepare, make) for name, make in contestants.items()]
        prepared = [one.result() for one in preparing]
        rounds = [_round(processes, f"{number}/{repeats}") for number in range(repeats + 1)]
    return [
        Turns(
            name,
            seconds=tuple(turn.seconds for turn in turns[1:]),
            counted=turns[-1].counted,
            startup_cpu_seconds=cpu_seconds,
            idle_bytes=idle_bytes,
            peak_bytes=turns[-1].peak_bytes,
        )
        for name, turns, (cpu_seconds, idle_bytes) in zip(
            contestants, zip(*rounds, strict=True), prepared, strict=True
        )
    ]


def _round(processes: Mapping[str, ProcessPoolExecutor], number: str) -> list[Turn]:
    turns = []
    for name, process in processes.items():
        print(f"turn {number}: {name}", file=sys.stderr, flush=True)
        turns.append(process.submit(take_turn).result())
    return turns


def own_process() -> ProcessPoolExecutor:
    """A new process that runs what is submitted, one call after the other."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def prepare(make: Callable[[], Work]) -> tuple[float, int]:
    """Prepare this process's contestant; return the CPU seconds since the process began, and its memory."""
    global _work
    _work = make()
    return time.process_time(), peak_bytes(reset=True)


def take_turn() -> Turn:
    """Run one turn of this process's contestant."""
    started = time.perf_counter()
    counted = _work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Turn(time.perf_counter() - started, counted, peak_bytes())


def peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process held; `reset` makes it begin at what is held now."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    if reset:
        reset_peak()
    return counters("status")["VmHWM"]


def print_turns(turns: Sequence[Turns], *, against: str) -> None:
    """Print seconds, ratios to the contestant `against` (the first, where that did not run), and memory."""
    print(machine())
    base = next((one for one in turns if one.name == against), turns[0])
    rows = []
    for one in turns:
        ratios = [mine / theirs for mine, theirs in zip(one.seconds, base.seconds, strict=True)]
        rows.append({
            "": one.name,
            "median s": f"{median(one.seconds):.3f}",
            "min..max s": f"{min(one.seconds):.3f}..{max(one.seconds):.3f}",
            "ratio": f"{median(ratios):.3f}",
            "of turns": f"{min(ratios):.3f}..{max(ratios):.3f}",
            "peak MB": f"{one.peak_bytes / 1e6:.0f}",
            "above idle MB": f"{(one.peak_bytes - one.idle_bytes) / 1e6:.0f}",
        })  # fmt: skip
    print_table(rows)
    for one in turns:
        if "waiting" in one.counted:
            print(f"{one.name}: waiting for batches {one.counted['waiting']:.1%} of the time")


def machine() -> str:
    """The hardware and the version of torch, in words."""
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return (
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cores}, torch {torch.__version__}"
    )


def stage_app(
    about: str,
    contestants: Mapping[str, Callable[[Case], Work]],
    prepare: Callable[[Case], None],
    *,
    against: str,
) -> typer.Typer:
    """The command line of a stage's script. `prepare` writes what the contestants read; ratios are to `against`."""
    app = typer.Typer(add_completion=False)

    @app.command(help=about)
    def run(
        size: Size = "small",
        tokens: Annotated[int, typer.Option(help="positions of a sample, vision tokens included")] = 300,
        samples: int = 16,
        batch_size: int = 8,
        repeats: int = 5,
        only: Annotated[str, typer.Option(help="contestants")] = ",".join(contestants),
        profiled: Annotated[str, typer.Option(help="instead: print torch's profile of this contestant")] = "",
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(size, tokens, samples, batch_size, Path(folder))
            prepare(case)
            if profiled:
                print(_profile(contestants[profiled](case)))
            else:
                chosen = {name: partial(contestants[name], case) for name in only.split(",")}
                print_turns(measure(chosen, repeats), against=against)

    return app


def _profile(work: Work) -> str:
    """The operators that take most of a second turn, without what they call."""
    work()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        work()
    by = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50)
