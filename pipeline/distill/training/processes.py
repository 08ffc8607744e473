"""The processes that train one student together, as torchrun, `accelerate launch` or SLURM started them."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from pipeline.errors import PipelineError, writing

LOCK = "lock"


def num_processes() -> int:
    """Return the number of processes over all machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first_process() -> bool:
    """Whether this process is the one that prints results and writes files."""
    return int(os.environ.get("RANK") or 0) == 0


def check_together(connected: int) -> None:
    """Raise `PipelineError` unless as many processes are connected as the launcher started.

    Processes without a connection would each train by itself and write into the same folder.
    """
    if connected != num_processes():
        raise PipelineError(
            f"{num_processes()} processes were started, but this one is connected with {connected - 1} others: each "
            "would train by itself into one folder; start one for each GPU with torchrun or accelerate launch, or "
            "set train.use_cpu=true"
        )


@contextmanager
def connected() -> Iterator[None]:
    """Close the connection to the other processes at the end of the block, if one was made in it.

    Left open, a thread of gloo may still run when the interpreter exits, and then aborts the process (exit code -6).
    It also runs on while anything holds a group: a trainer does, and it is a cycle that only the collector frees.
    """
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()
            gc.collect()


@contextmanager
def alone_in(folder: Path, *, setting: str = "output_dir") -> Iterator[None]:
    """Hold the folder of a training or a sweep, created if needed. Raises `PipelineError` if another process does.

    `setting` is the one that names the folder. The lock is a record lock: workers that load data do not inherit it,
    and a crash releases it.
    """
    with writing(folder, then=f"give this user the right to write there, or give another {setting}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise PipelineError(
                    f"{folder}: another process is training there; wait for it, or give another {setting}"
                ) from error
            # A file system without locks: other processes go unnoticed.
        yield
