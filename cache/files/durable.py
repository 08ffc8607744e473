"""Files that survive a crash: fsync, atomic replacement, publishing by rename; and hashes of content."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from blake3 import blake3

_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
_NO_SYNC = "%s: this file system cannot sync a directory (%s); a power cut may undo the last renames"
_noted: set[int] = set()  # errno values of directory syncs already logged: one line each is enough


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write `data` and force it to the disk; a crash may leave a partial file."""
    with named(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with named(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, scratch: Path) -> None:
    """Replace the content of `path`: after a crash it holds the old bytes or the new, never a mixture."""
    write_file(scratch, data)
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync_folders(directory: Path) -> None:
    """Force the names in `directory` and in every folder below it to the disk, the deepest folders first."""
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to the disk.

    Some network and FUSE file systems cannot sync a directory. That is logged once and is no failure: the files
    themselves are on the disk, and a part whose name is lost in a power cut is captured again.
    """
    with named(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
            if error.errno not in _noted:
                _noted.add(error.errno)
                logging.getLogger(__name__).warning(_NO_SYNC, directory, error.strerror)
        finally:
            os.close(descriptor)


@contextmanager
def named(path: Path) -> Generator[None]:
    """Add the path to an OSError that lacks one: write and fsync know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(directory: Path, target: Path) -> bool:
    """Rename a finished directory to its final name; False, and nothing changed, if `target` already exists."""
    try:
        # rename(2) replaces an empty directory, but refuses one that holds anything: so exactly one writer wins.
        os.rename(directory, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_directory(target.parent)
    return True


def hash_file(path: Path) -> str:
    """Return the blake3 of a file's bytes, in hex. Not by `mmap`: a failing disk would kill the process."""
    with open(path, "rb") as file:
        return hash_opened(file)


def hash_opened(file: Any) -> str:
    """Return the blake3 of what an open file holds, in hex, read block by block."""
    return hashlib.file_digest(file, cast(Any, blake3)).hexdigest()


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the blake3 of the bytes, in hex."""
    return blake3(data).hexdigest()
