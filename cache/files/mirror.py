"""A read-through mirror: pieces of remote files kept in a local folder, the least recently used dropped first."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.files.durable import hash_bytes

_DIGEST_BYTES = 32
_ROOM = 0.9  # of the limit is what a sweep leaves
_OURS = re.compile(r"[0-9a-f]{32}(\.[0-9a-f]{8})?")  # a mirror in a folder of other things leaves those alone


@dataclass(frozen=True)
class Mirror:
    """A folder that any number of processes may read and fill, and the bytes that it may hold.

    A process sweeps when what it found and wrote itself passes the limit, so between two sweeps n processes may
    pass it by what n - 1 of them wrote.
    """

    folder: Path
    limit_bytes: int

    def of(self, version: str) -> MirrorFolder:
        """The folder of one version of files: what replaces them has another, so nothing kept can be out of date."""
        return MirrorFolder(self, version)


@dataclass(frozen=True)
class MirrorFolder:
    """The pieces of one version of files. A damaged piece is as good as none: each carries its own digest."""

    mirror: Mirror
    version: str

    def get(self, name: str) -> bytes | None:
        """A piece that was put; None if it was not, was dropped, or is damaged."""
        file = self._file(name)
        try:
            kept = file.read_bytes()
            os.utime(file)  # used now: the sweep goes by this
        except OSError:
            return None
        digest, data = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
        return data if bytes.fromhex(hash_bytes(data)) == digest else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece, if it is no larger than the mirror; a full disk loses the piece, not the run."""
        size = _DIGEST_BYTES + len(data)
        if size > self.mirror.limit_bytes:
            return
        _make_room(self.mirror, size)
        file = self._file(name)
        ours = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            ours.write_bytes(bytes.fromhex(hash_bytes(data)) + data)
            os.replace(ours, file)
        except OSError:
            with suppress(OSError):
                ours.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.mirror.folder / self.version[:32] / hash_bytes(name.encode())[:32]


_held: dict[Path, int] = {}  # bytes in each mirror's folder, as this process knows them


def _make_room(mirror: Mirror, size: int) -> None:
    """Count `size` bytes more, and drop the least recently used pieces if they would pass the limit."""
    if mirror.folder not in _held:
        _held[mirror.folder] = sum(held for _, held, _ in _pieces(mirror.folder))
    _held[mirror.folder] += size
    if _held[mirror.folder] <= mirror.limit_bytes:
        return
    held = size
    for _, piece_bytes, file in sorted(_pieces(mirror.folder), reverse=True):
        if held + piece_bytes > _ROOM * mirror.limit_bytes:
            with suppress(OSError):
                os.unlink(file)
        else:
            held += piece_bytes
    _held[mirror.folder] = held


def _pieces(folder: Path) -> list[tuple[float, int, str]]:
    """When each piece was last used, its bytes, and its file."""
    found: list[tuple[float, int, str]] = []
    versions = [entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name)] if folder.is_dir() else []
    for version in versions:
        with suppress(OSError), os.scandir(version) as files:
            for file in files:
                with suppress(FileNotFoundError):
                    if not _OURS.fullmatch(file.name):
                        continue
                    about = file.stat()
                    found.append((about.st_mtime, about.st_size, file.path))
    return found
