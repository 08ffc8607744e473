"""A lock of a whole store, held for moments: to plan parts, and to publish one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.format.layout import lock_file


@contextmanager
def store_lock(store: Path) -> Generator[None]:
    """Hold off other writers of the store that plan or publish at the same moment.

    The lock is on a file, because a network file system cannot lock a directory. One that cannot lock files either
    goes without: a planned name may then be lost until its writer opens the store again, and two parts published in
    the same moment may hold one key, which the next reader of the store reports.
    """
    descriptor = _opened(lock_file(store))
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _opened(file: Path) -> int:
    """For writing, without which a network file system gives no exclusive lock; another user's for reading."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
