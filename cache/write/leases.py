"""Who may write: a lease on a part while a writer works on it, and a lock on the store, held for moments.

Other writers leave alone a part whose lease is held, and take over from a dead writer. A lease is a file. Its creator
holds it, and touches it while it works; a lease not touched for `patience` seconds has expired. Taking over is a
rename, which one contender wins. Leases only save work: should two writers hold one part after all, the first to
publish it wins, and the store is the same.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.files.durable import write_file
from cache.format.layout import LEASES, LOCK, check_part_name
from cache.write.scratch import new_scratch, remove, scratch_owner

PATIENCE_SECONDS = 60.0
_TOUCHES = 4  # within the patience of others


@contextmanager
def lease(store: Path, part: str, *, patience: float = PATIENCE_SECONDS) -> Generator[bool]:
    """Hold the part's lease for the block, if it is free; True if it is ours, False if another writer holds it."""
    file = store / LEASES / check_part_name(part)
    name = new_scratch(store, part).name
    if not _claim(store, file, name, patience):
        yield False
        return
    done = threading.Event()
    toucher = threading.Thread(target=_touch, args=(file, name, done, patience / _TOUCHES), daemon=True)
    toucher.start()
    try:
        yield True
    finally:
        done.set()
        toucher.join()
        if lease_holder(file) == name:
            file.unlink(missing_ok=True)


def sweep_leases(store: Path) -> None:
    """Remove the leases of dead processes: one may be killed after its part was published, before it lets go."""
    for file in (store / LEASES).iterdir():
        if (owner := scratch_owner(lease_holder(file))) and owner.is_dead:
            remove(file)


def lease_holder(file: Path) -> str:
    """Return who holds a lease, the name of a scratch file of its process; "" if that cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text().strip()
    return ""


def _claim(store: Path, file: Path, name: str, patience: float) -> bool:
    """Create the lease under our name; False if another writer holds it."""
    while True:
        try:
            with open(file, "x") as ours:  # of several writers that do so, one succeeds
                ours.write(name)
            return True
        except FileExistsError:
            if not _take_away(store, file, patience):
                return False


def _take_away(store: Path, file: Path, patience: float) -> bool:
    """Remove the lease of a dead writer; False if its holder lives, True if it is gone, removed by anyone."""
    try:
        holder, touched = lease_holder(file), file.stat().st_mtime
    except FileNotFoundError:
        return True
    owner = scratch_owner(holder)
    if not (owner and owner.is_dead) and _now(store) - touched < patience:
        return False
    aside = new_scratch(store, f"{file.name}.lease")
    with suppress(FileNotFoundError):
        os.rename(file, aside)
        if lease_holder(aside) != holder:  # another writer took over in between: give it its lease back
            with suppress(FileExistsError):
                os.link(aside, file)
    remove(aside)
    return True


def _now(store: Path) -> float:
    """Return the time by the file system's clock, which stamps the leases: the clocks of hosts differ."""
    probe = new_scratch(store, "clock")
    write_file(probe, b"")
    try:
        return probe.stat().st_mtime
    finally:
        remove(probe)


def _touch(file: Path, name: str, done: threading.Event, interval: float) -> None:
    while not done.wait(interval):
        if lease_holder(file) == name:  # else it was taken over: whoever publishes first wins
            with suppress(FileNotFoundError):
                os.utime(file)


@contextmanager
def store_lock(store: Path) -> Generator[None]:
    """Hold off other writers of the store that plan or publish at the same moment.

    The lock is on a file, because a network file system cannot lock a directory. One that cannot lock files either
    goes without: a planned name may then be lost until its writer opens the store again, and two parts published in
    the same moment may hold one key, which the next reader of the store reports.
    """
    file = store / LOCK
    try:
        # NFS gives an exclusive lock only on a file open for writing. The file may belong to another user.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
