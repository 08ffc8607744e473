"""Leases: which living writer is at work on a part, so that others leave it alone and take over from the dead.

A lease is a file. Whoever creates it holds it and touches it while at work; one not touched for `patience` seconds is
its holder's no more. Taking over is a rename, which one contender wins. Leases save work and no more: should two
writers hold one part after all, the first to publish it wins, and the store is the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.files.durable import write_file
from cache.format.layout import lease_file, leases_path
from cache.write.scratch import new_scratch, remove, scratch_owner

PATIENCE_SECONDS = 60.0
BEATS = 4  # touches within the patience of others


@contextmanager
def lease(store: Path, part: str, *, patience: float = PATIENCE_SECONDS) -> Generator[bool]:
    """Hold the part's lease for the block, if it is free; True if it is ours, False if another writer is at work."""
    file = lease_file(store, part)
    name = _claim(store, file, patience)
    if name is None:
        yield False
        return
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, name, done, patience / BEATS), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        done.set()
        heart.join()
        if lease_holder(file) == name:
            file.unlink(missing_ok=True)


def sweep_leases(store: Path) -> None:
    """Remove the leases of processes that are surely dead: a kill may come after the part was published, too."""
    for file in leases_path(store).iterdir():
        owner = scratch_owner(lease_holder(file))
        if owner and owner.is_dead:
            remove(file)


def lease_holder(file: Path) -> str:
    """Who holds a lease, as its file says: the name of a scratch file of its process."""
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text().strip()
    return ""


def _claim(store: Path, file: Path, patience: float) -> str | None:
    """The name that we hold the lease under; None if another writer is at work."""
    name = new_scratch(store, file.name).name
    while True:
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if not _take_away(store, file, patience):
                return None
            continue
        with os.fdopen(descriptor, "w") as ours:
            ours.write(name)
        return name


def _take_away(store: Path, file: Path, patience: float) -> bool:
    """Remove the lease of a dead writer; False if its holder lives, True if it is gone, by whomever."""
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
        if lease_holder(aside) != holder:  # another took over in between: the lease is its own again
            with suppress(FileExistsError):
                os.link(aside, file)
    remove(aside)
    return True


def _now(store: Path) -> float:
    """The file system's own time, with which leases are stamped: hosts' clocks differ."""
    probe = new_scratch(store, "clock")
    write_file(probe, b"")
    try:
        return probe.stat().st_mtime
    finally:
        remove(probe)


def _beat(file: Path, name: str, done: threading.Event, interval: float) -> None:
    while not done.wait(interval):
        if lease_holder(file) == name:  # else it was taken over, and whoever publishes first wins
            with suppress(FileNotFoundError):
                os.utime(file)
