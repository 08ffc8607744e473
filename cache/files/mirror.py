"""A read-through mirror: pieces of remote files kept in a local folder, the least recently used dropped first.

It is not one of cachetools' caches, which live in one process: data workers of all ranks share this folder.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cache.files.durable import hash_bytes

_DIGEST_BYTES = 32
_KEPT_SHARE = 0.9  # of the limit, left by a sweep: so that sweeps, which list the folder, are rare
_held: dict[Path, int] = {}  # bytes in each mirror's folder, as far as this process knows
_OURS = re.compile(r"[0-9a-f]{32}(\.[0-9a-f]{8})?")  # other files in the folder are left alone


@dataclass(frozen=True)
class Mirror:
    """A folder that any number of processes may read and fill, and how many bytes it may hold.

    Pieces are kept by the `version` of the files that they are of, so that none is ever stale. A piece is a file: a
    blake3 digest (32 bytes), and then the bytes that it is of.

    Each process counts what it found and what it wrote itself, and sweeps when that passes the limit. So between two
    sweeps n processes may exceed the limit by what n - 1 of them wrote.
    """

    folder: Path
    limit_bytes: int
    version: str = ""

    def get(self, name: str) -> bytes | None:
        """Return a piece; None if it was never put, was dropped, or is damaged."""
        file = self._file(name)
        try:
            kept = file.read_bytes()
            os.utime(file)  # the sweep goes by the time of last use
        except OSError:
            return None
        digest, data = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
        return data if bytes.fromhex(hash_bytes(data)) == digest else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a piece, unless it is larger than the mirror. A full disk loses the piece and raises nothing."""
        size = _DIGEST_BYTES + len(data)
        if size > self.limit_bytes:
            return
        self._make_room(size)
        file = self._file(name)
        unfinished = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(bytes.fromhex(hash_bytes(data)) + data)
            os.replace(unfinished, file)
        except OSError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / self.version[:32] / hash_bytes(name.encode())[:32]

    def _make_room(self, size: int) -> None:
        """Count `size` more bytes; if they pass the limit, drop the least recently used pieces."""
        if self.folder not in _held:
            _held[self.folder] = sum(piece_bytes for _, piece_bytes, _ in _pieces(self.folder))
        _held[self.folder] += size
        if _held[self.folder] <= self.limit_bytes:
            return
        held = size
        for _, piece_bytes, file in sorted(_pieces(self.folder), reverse=True):
            if held + piece_bytes <= _KEPT_SHARE * self.limit_bytes:
                held += piece_bytes
            else:
                with suppress(OSError):
                    file.unlink()
        _held[self.folder] = held


def _pieces(folder: Path) -> list[tuple[float, int, Path]]:
    """Return of each piece when it was last used, its bytes, and its file."""
    found: list[tuple[float, int, Path]] = []
    # Not by `glob`: it lists foreign folders, too, and raises where one vanishes or cannot be listed.
    versions = [entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name)] if folder.is_dir() else []
    for version in versions:
        with suppress(OSError):
            for file in version.iterdir():
                if _OURS.fullmatch(file.name):
                    with suppress(FileNotFoundError):  # another process sweeps, too
                        status = file.stat()
                        found.append((status.st_mtime, status.st_size, file))
    return found
