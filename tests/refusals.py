"""Makes the system refuse: a user without rights, few open files, a file on a disk that fails."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def without_rights() -> Iterator[None]:
    """Run as a user whom permissions bind: as root they bind nobody."""
    if os.geteuid():
        yield
        return
    try:
        os.setresuid(NOBODY, NOBODY, 0)
    except OSError as error:
        pytest.skip(f"root here may not become another user: {error}")
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def closed(folder: Path, mode: int = 0) -> Iterator[Path]:
    """A folder or file of the mode, which gets its own back."""
    before = folder.stat().st_mode
    folder.chmod(mode)
    try:
        yield folder
    finally:
        folder.chmod(before)


@contextmanager
def few_open_files(spare: int) -> Iterator[None]:
    """Let the process open no more than so many files beside those that are open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry) for entry in os.listdir("/proc/self/fd"))
    fillers = [os.open(os.devnull, os.O_RDONLY)]  # the limit is on numbers, and the lowest free one is given
    while fillers[-1] < highest:
        fillers.append(os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(highest, *fillers) + 1 + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in fillers:
            os.close(descriptor)


def put_on_a_failing_disk(file: Path) -> None:
    """Make reads at its start fail with EIO, as a disk does: address 0 of a process's memory cannot be read."""
    file.unlink()
    file.symlink_to("/proc/self/mem")
