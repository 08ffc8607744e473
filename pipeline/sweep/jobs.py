"""Runs side by side: a process each, with its own log, its share of the cores, and one of the visible GPUs."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from cache import CacheError
from pipeline.errors import PipelineError

LOG = "log.txt"

T = TypeVar("T")


@dataclass(frozen=True)
class Job(Generic[T]):
    """A function to call with its arguments in a process of its own, whose output goes to `folder`/log.txt."""

    name: str
    work: Callable[..., T]
    arguments: tuple[Any, ...]
    folder: Path


@dataclass(frozen=True)
class Failed:
    """Why a job has no result."""

    reason: str


def run_jobs(jobs: Sequence[Job[T]], *, at_once: int) -> Iterator[tuple[Job[T], T | Failed]]:
    """Each job with its result as it finishes, or with why it has none; a job that is killed stops no other.

    Left early, for whatever reason, it ends the processes that still run.
    """
    context = get_context("spawn")
    waiting, free = list(jobs), list(range(at_once))
    running: dict[Any, tuple[Job[T], Any, int]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, theirs, device_of(place), at_once))
                process.start()
                theirs.close()
                running[process.sentinel] = (job, (process, ours), place)
            for sentinel in wait([*running, *(ends[1] for _, ends, _ in running.values())]):
                finished = next((s for s, (_, ends, _) in running.items() if sentinel in (s, ends[1])), None)
                if finished is not None:
                    job, (process, ours), place = running.pop(finished)
                    free.append(place)
                    yield job, _result(process, ours, job)
    finally:
        for _, (process, _), _ in running.values():
            process.terminate()


def device_of(place: int) -> str | None:
    """The GPU of a place, one of those that this process may use; None where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    visible = named.split(",")[:count] if named else [str(number) for number in range(count)]
    return visible[place % len(visible)] if visible else None


def threads_for(at_once: int) -> int | None:
    """Threads of each of so many jobs; None if `OMP_NUM_THREADS` says it already."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // at_once)


def _result(process: Any, ours: Any, job: Job[T]) -> T | Failed:
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        result = Failed(
            f"its process ended with exit code {process.exitcode} (-9: killed, perhaps for want of memory: lower "
            f"--jobs); its log is {job.folder / LOG}"
        )
    process.join()
    return result


def _work(job: Job[Any], connection: Any, device: str | None, at_once: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if (threads := threads_for(at_once)) is not None:
        torch.set_num_threads(threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOG, "w") as log, redirect_stdout(log), redirect_stderr(log):
        connection.send(attempt(job))


def attempt(job: Job[T]) -> T | Failed:
    """The job's result, or why it has none; what the program cannot tell in a sentence leaves its traceback, too."""
    try:
        return job.work(*job.arguments)
    except (PipelineError, CacheError, OSError) as error:
        return Failed(f"{type(error).__name__}: {error}")
    except Exception as error:  # a library's, of any type: this run failed, and the others are to go on
        traceback.print_exc()
        return Failed(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """A sweep that was killed leaves no process behind that would write into its folder."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
