"""Files that survive a crash: fsync, atomic replacement, publication by rename, content hashes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

_BLOCK_BYTES = 1 << 20


def write_file(path: Path, data: bytes) -> None:
    """Write `data` and force it to the disk; a crash may leave a partial file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, scratch: Path) -> None:
    """Give `path` the content `data`: after a crash it holds the old bytes or the new, never a mixture."""
    write_file(scratch, data)
    os.replace(scratch, path)
    sync_directory(path.parent)


def sync_tree(directory: Path) -> None:
    """Force every file and directory below `directory` to the disk, and itself; zarr's own writes do not."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            _sync(os.path.join(folder, name), os.O_RDONLY)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


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


def hash_bytes(data: bytes) -> str:
    """blake3, in hex."""
    return blake3(data).hexdigest()


def files_below(directory: Path) -> dict[str, int]:
    """Size in bytes of every file below `directory`, by its relative path with '/'."""
    found = (path for path in sorted(directory.rglob("*")) if not path.is_dir() or path.is_symlink())
    return {path.relative_to(directory).as_posix(): path.lstat().st_size for path in found}


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
