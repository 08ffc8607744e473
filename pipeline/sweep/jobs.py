"""Run jobs in parallel: each in its own process, with its own log, its share of the cores and one visible GPU."""

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
    """A function and its arguments, to be called in a process of its own; output goes to `folder`/log.txt."""

    name: str
    work: Callable[..., T]
    arguments: tuple[Any, ...]
    folder: Path


@dataclass(frozen=True)
class Failed:
    """Why a job has no result."""

    reason: str


def run_jobs(jobs: Sequence[Job[T]], *, at_once: int) -> Iterator[tuple[Job[T], T | Failed]]:
    """Yield each job with its result, or with why it failed, as they finish. A killed job stops no other.

    Closing the iterator early terminates the processes that still run.
    """
    context = get_context("spawn")
    waiting, free_slots = list(jobs), list(range(at_once))
    running: dict[Any, tuple[Job[T], Any, int]] = {}  # by the connection that a job's result comes through
    try:
        while waiting or running:
            while waiting and free_slots:
                job, slot = waiting.pop(0), free_slots.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, theirs, device_of(slot), at_once))
                process.start()
                theirs.close()  # now only the job holds this end, so `ours` is ready when the job dies, too
                running[ours] = (job, process, slot)
            for ours in wait(list(running)):
                job, process, slot = running.pop(ours)
                free_slots.append(slot)
                yield job, _result(process, ours, job)
    finally:
        for _, process, _ in running.values():
            process.terminate()


def device_of(slot: int) -> str | None:
    """Return the GPU of a slot, one of those visible to this process; None without a GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    visible = named.split(",")[:count] if named else [str(number) for number in range(count)]
    return visible[slot % len(visible)] if visible else None


def threads_for(at_once: int) -> int | None:
    """Return the number of threads for each of `at_once` jobs; None if `OMP_NUM_THREADS` sets it."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // at_once)


def attempt(job: Job[T]) -> T | Failed:
    """Return the job's result, or why it failed; an unexpected error also leaves its traceback on stderr."""
    try:
        return job.work(*job.arguments)
    except Exception as error:  # a library may raise any type: this run failed, the rest continue
        if not isinstance(error, PipelineError | CacheError | OSError):
            traceback.print_exc()
        return Failed(f"{type(error).__name__}: {error}")


def _result(process: Any, ours: Any, job: Job[T]) -> T | Failed:
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        result = Failed(
            f"its process ended with exit code {process.exitcode} (-9: killed, perhaps out of memory: lower --jobs); "
            f"its log is {job.folder / LOG}"
        )
    process.join()
    return result


def _work(job: Job[Any], connection: Any, device: str | None, at_once: int) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if (threads := threads_for(at_once)) is not None:
        torch.set_num_threads(threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / LOG, "w") as log, redirect_stdout(log), redirect_stderr(log):
        connection.send(attempt(job))


def _exit_with_parent() -> None:
    """Exit when the sweep is killed, so that no job writes into its folder afterwards."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
