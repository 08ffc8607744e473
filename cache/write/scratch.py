"""Unfinished work in tmp/: which process writes it, and removing what a dead process left behind.

Whether a process still runs can be asked only where its id means the same process. Host names do not say that:
containers and pods share their host's name, each with process ids of its own. So the name of a scratch file carries
a digest of the boot of the system and of the process id namespace, as Linux numbers them. Other systems number
neither: there nothing counts as dead, and only its age tells.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.files.durable import hash_bytes, publish
from cache.files.local_files import names_in
from cache.format.layout import SCRATCH, part_path

REPLACED = ".replaced"  # ends the stem of a part that was moved out of its place


@dataclass(frozen=True)
class ScratchOwner:
    """The process that an unfinished part belongs to."""

    host: str
    process: int

    @property
    def is_dead(self) -> bool:
        """True only when that is certain: processes of another machine or container cannot be asked."""
        if self.host != this_host():
            return False
        try:
            os.kill(self.process, 0)  # sends nothing, only asks whether the process exists
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        return False


def new_scratch(store: Path, stem: str) -> Path:
    """Return a path in tmp/ that no other writer uses, with this host and process id; nothing is created."""
    return store / SCRATCH / f"{stem}.{this_host()}.{os.getpid()}.{secrets.token_hex(4)}"


def scratch_owner(name: str) -> ScratchOwner | None:
    """Return the owner of an entry of tmp/ by its name; None if `new_scratch` did not make the name."""
    match = re.fullmatch(r".+\.([A-Za-z0-9-]+)\.([0-9]+)\.[0-9a-f]{8}", name)
    return ScratchOwner(match[1], int(match[2])) if match else None


def sweep_dead(store: Path) -> list[str]:
    """Remove what processes that certainly no longer run left in tmp/; returns the names removed.

    If a process died while it replaced a part, after it moved the old one out, the old one is put back.
    """
    removed: list[str] = []
    for name in names_in(store / SCRATCH):
        if (owner := scratch_owner(name)) and owner.is_dead and not _put_back(store, name):
            remove(store / SCRATCH / name)
            removed.append(name)
    return removed


def _put_back(store: Path, name: str) -> bool:
    part, replaced, _ = name.rpartition(f"{REPLACED}.")
    if not replaced or (target := part_path(store, part)).exists():
        return False
    return publish(store / SCRATCH / name, target)


def sweep_old(store: Path, *, seconds: float) -> list[str]:
    """Remove all of tmp/ that was not touched for so long, whoever owns it; returns the names removed."""
    removed: list[str] = []
    for name in names_in(store / SCRATCH):
        entry = store / SCRATCH / name
        files = [entry, *entry.rglob("*")] if entry.is_dir() and not entry.is_symlink() else [entry]
        if time.time() - max(file.lstat().st_mtime for file in files) > seconds:
            remove(entry)
            removed.append(name)
    return removed


def remove(path: Path) -> None:
    """Remove a file or a directory; one that is gone is fine, as another sweeper may do the same."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def this_host() -> str:
    """Return the host's name, for people, and a digest of where process ids mean the same processes."""
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"
    space = secrets.token_hex(6)  # where neither file can be read
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        space = hash_bytes(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode())[:12]
    return f"{name}-{space}"
