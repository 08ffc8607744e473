"""Files that survive a crash: fsync, atomic replacement, publication by rename, content hashes."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

_BLOCK_BYTES = 1 << 20
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
_noted: set[int] = set()  # errors of directory syncs that were logged; one line each is enough


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
    """Give `path` the content `data`: after a crash it holds the old bytes or the new, never a mixture."""
    write_file(scratch, data)
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync_folders(directory: Path) -> None:
    """Bring the names in every directory below `directory`, and in itself, to the disk."""
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk.

    Some network and FUSE file systems refuse to sync a directory. That is logged once and is no failure: the files
    themselves are on the disk, and a name that a power cut loses is a part still to do.
    """
    with named(directory):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
            _note(directory, error)
        finally:
            os.close(descriptor)


def _note(directory: Path, error: OSError) -> None:
    number = error.errno or 0
    if number not in _noted:
        _noted.add(number)
        logging.getLogger(__name__).warning(
            "%s: this file system cannot sync a directory (%s); a power cut may undo the last renames",
            directory,
            error.strerror,
        )


@contextmanager
def named(path: Path) -> Generator[None]:
    """Add the path to an error of the system that lacks one: write and fsync know a descriptor only."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(directory: Path, target: Path) -> bool:
    """Rename a finished directory to its place; False, and nothing changed, if `target` is already taken."""
    try:
        os.rename(directory, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_directory(target.parent)
    return True


def hash_file(path: Path) -> str:
    """blake3 of the file's bytes, in hex."""
    with open(path, "rb") as file:
        return hash_blocks(iter(lambda: file.read(_BLOCK_BYTES), b""))


def hash_blocks(blocks: Iterable[bytes]) -> str:
    """blake3 of bytes that come in blocks, in hex."""
    digest = blake3()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def hash_bytes(data: bytes | memoryview) -> str:
    """blake3, in hex."""
    return blake3(data).hexdigest()


def files_below(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below `directory`, by its relative path with '/'."""
    found = (path for path in sorted(directory.rglob("*")) if not path.is_dir() or path.is_symlink())
    return {path.relative_to(directory).as_posix(): path.lstat().st_size for path in found}
