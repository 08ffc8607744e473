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
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from bench.models import Case, Size
from bench.processes import counters, reset_peak
from bench.tables import print_table

Work = Callable[[], Mapping[str, float]]


class Turn(NamedTuple):
    """One turn of a contestant, and the most memory that its process held so far."""

    seconds: float
    counted: Mapping[str, float]
    peak_bytes: int
    above_idle_bytes: int


def measure(contestants: Mapping[str, Callable[[], Work]], repeats: int) -> dict[str, list[Turn]]:
    """Return the timed turns of every contestant. They prepare at the same time, and take turns afterwards."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(own_process()) for name in contestants}
        for preparing in [processes[name].submit(_prepare, make) for name, make in contestants.items()]:
            preparing.result()
        for number in range(repeats + 1):
            for name, process in processes.items():
                print(f"turn {number}/{repeats}: {name}", file=sys.stderr, flush=True)
                turns[name].append(process.submit(_take_turn).result())
    return {name: of_one[1:] for name, of_one in turns.items()}


def own_process() -> ProcessPoolExecutor:
    """A new process that runs what is submitted, one call after the other."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _prepare(make: Callable[[], Work]) -> None:
    """Prepare this process's contestant, and begin to watch its memory."""
    global _work, _idle_bytes
    _work = make()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak()
    _idle_bytes = _peak_bytes()


def _take_turn() -> Turn:
    """Run one turn of this process's contestant."""
    started = time.perf_counter()
    counted = _work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, peak_bytes = time.perf_counter() - started, _peak_bytes()
    return Turn(seconds, counted, peak_bytes, peak_bytes - _idle_bytes)


def _peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else counters("status")["VmHWM"]


def print_turns(turns: Mapping[str, Sequence[Turn]], *, against: str) -> None:
    """Print seconds, ratios to the contestant `against` (the first, where that did not run), and memory."""
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else cores, f"torch {torch.__version__}")
    seconds = {name: [turn.seconds for turn in of_one] for name, of_one in turns.items()}
    base, rows = seconds.get(against) or next(iter(seconds.values())), []
    for name, of_one in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(of_one, base, strict=True)]
        rows.append({
            "": name,
            "median s": f"{median(of_one):.3f}",
            "min..max s": f"{min(of_one):.3f}..{max(of_one):.3f}",
            "ratio": f"{median(ratios):.3f}",
            "of turns": f"{min(ratios):.3f}..{max(ratios):.3f}",
            "peak MB": f"{turns[name][-1].peak_bytes / 1e6:.0f}",
            "above idle MB": f"{turns[name][-1].above_idle_bytes / 1e6:.0f}",
        })  # fmt: skip
    print_table(rows)
    for name, of_one in turns.items():
        if waiting := of_one[-1].counted.get("waiting"):
            print(f"{name}: waiting for batches {waiting:.1%} of the time")


def stage_app(
    about: str, contestants: Mapping[str, Callable[[Case], Work]], prepare: Callable[[Case], None]
) -> typer.Typer:
    """The command line of a stage's script. `prepare` writes what all read; ratios are to the first contestant."""
    app = typer.Typer(add_completion=False)

    @app.command(help=about)
    def run(
        size: Size = "small",
        tokens: Annotated[int, typer.Option(help="positions of a sample, vision tokens included")] = 300,
        samples: int = 16,
        batch_size: int = 8,
        workers: Annotated[int, typer.Option(help="that load data, in stage 2")] = 2,
        repeats: int = 5,
        only: Annotated[str, typer.Option(help="contestants")] = ",".join(contestants),
        profiled: Annotated[str, typer.Option(help="instead: print torch's profile of this contestant")] = "",
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(size, tokens, samples, batch_size, Path(folder), workers)
            prepare(case)
            if profiled:
                print(_profile(contestants[profiled](case)))
            else:
                chosen = {name: partial(contestants[name], case) for name in only.split(",")}
                print_turns(measure(chosen, repeats), against=next(iter(contestants)))

    return app


def _profile(work: Work) -> str:
    """The operators that take most of a second turn, without what they call."""
    work()
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
    by = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50)
