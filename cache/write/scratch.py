"""Unfinished work in tmp/: who is writing it, and sweeping what a dead process left behind.

Whether a process still runs can be asked only where its id means the same process. Host names do not tell: containers
and pods share their host's, each with process ids of its own. So a name carries the running system and the space of
process ids that it was given in, as Linux numbers them. Other systems number neither: there nothing counts as dead
before it is old.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cache.files.durable import hash_bytes, publish
from cache.format.layout import part_path, scratch_path

REPLACED = ".replaced"  # ends the stem of a part that was taken out of its place


@dataclass(frozen=True)
class ScratchOwner:
    """The process that an unfinished part belongs to."""

    host: str
    process: int

    @property
    def is_dead(self) -> bool:
        """True only when that is certain: processes of another machine or container cannot be asked."""
        return self.host == this_host() and not _is_running(self.process)


def new_scratch(store: Path, stem: str) -> Path:
    """A path in tmp/ that no other writer uses, carrying this host and process id; nothing is created."""
    return scratch_path(store) / f"{stem}.{this_host()}.{os.getpid()}.{secrets.token_hex(4)}"


def scratch_owner(name: str) -> ScratchOwner | None:
    """Whose a directory in tmp/ is, by its name; None if no writer gave it."""
    match = re.fullmatch(r".+\.([A-Za-z0-9-]+)\.([0-9]+)\.[0-9a-f]{8}", name)
    return ScratchOwner(match[1], int(match[2])) if match else None


def sweep_dead(store: Path) -> list[str]:
    """Remove what processes that surely no longer run left in tmp/; returns the names removed.

    A part that was taken out to be replaced, by a process that died before the new one was in its place, is put back.
    """
    entries = sorted(scratch_path(store).iterdir()) if scratch_path(store).is_dir() else []
    dead = [entry for entry in entries if (owner := scratch_owner(entry.name)) and owner.is_dead]
    removed = [entry for entry in dead if not _put_back(store, entry)]
    for entry in removed:
        remove(entry)
    return [entry.name for entry in removed]


def _put_back(store: Path, entry: Path) -> bool:
    part, replaced, _ = entry.name.rpartition(f"{REPLACED}.")
    return bool(replaced) and not part_path(store, part).exists() and publish(entry, part_path(store, part))


def sweep_old(store: Path, *, seconds: float) -> list[str]:
    """Remove all of tmp/ that nothing touched for so long, whoever's it is; returns the names removed."""
    removed: list[str] = []
    for entry in sorted(scratch_path(store).iterdir()) if scratch_path(store).is_dir() else []:
        files = [entry, *entry.rglob("*")] if entry.is_dir() and not entry.is_symlink() else [entry]
        if time.time() - max(file.lstat().st_mtime for file in files) > seconds:
            remove(entry)
            removed.append(entry.name)
    return removed


def remove(path: Path) -> None:
    """Remove a file or a directory; another sweeper may be doing the same, so one already gone is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def this_host() -> str:
    """The host's name, for people, and a digest of where process ids mean what they mean here."""
    name = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "host"
    return f"{name}-{_process_space()}"


@cache
def _process_space() -> str:
    """A digest of this boot of the system and its process id namespace; random where neither can be read."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hash_bytes(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode())[:12]
    return secrets.token_hex(6)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
