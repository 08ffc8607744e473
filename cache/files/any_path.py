"""Paths of a store's files: on a local or network file system, or URLs that fsspec can read."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from cache.errors import NotThere
from cache.files import local_files, remote
from cache.files.durable import hash_file
from cache.files.mirror import Mirror


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL, with the methods of `Path` that reading a store needs, one request each."""

    url: str
    mirror: Mirror | None = None  # keeps pieces of the files below it

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.mirror)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def exists(self) -> bool:
        return find_ranges([Range(self, 0, 1)]) != [None]

    is_file = exists  # a server has no folders, only names that begin alike

    def is_dir(self) -> bool:
        return bool(remote.list_folder(self.url))

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in remote.list_folder(self.url))

    def read_bytes(self) -> bytes:
        if (data := read_file(self)) is None:
            raise FileNotFoundError(errno.ENOENT, "No such file", self.url)
        return data


AnyPath = Path | RemotePath


class Range(NamedTuple):
    """Bytes start..stop of a file; without a stop, to its end."""

    file: AnyPath
    start: int = 0
    stop: int | None = None


def any_path(path: str | Path | RemotePath) -> AnyPath:
    """Return a path or a URL, such as s3://bucket/teacher.zarr, as something to read from."""
    if isinstance(path, RemotePath):
        return path
    text = str(path).removeprefix("file://")
    return RemotePath(text.rstrip("/")) if "://" in text else Path(text)


def local(path: str | Path | RemotePath, *, doing: str) -> Path:
    """Return the path of a local folder. Raises `NotThere` for a URL, saying what cannot be done there."""
    found = any_path(path)
    if isinstance(found, RemotePath):
        raise NotThere(
            found, asked=f"a store behind a URL cannot be {doing}: do it in a folder, then `alignkd push`"
        )
    return found


def read_file(file: AnyPath) -> bytes | None:
    """Return the bytes of a file; None if there is no such file. Raises as `iter_ranges` does."""
    return find_ranges([Range(file)])[0]


def find_ranges(ranges: Sequence[Range], *, gap: int = 0) -> list[bytes | None]:
    """Return the bytes of every range, as `iter_ranges` yields them."""
    return list(iter_ranges(ranges, gap=gap))


def iter_ranges(ranges: Sequence[Range], *, gap: int = 0) -> Iterator[bytes | None]:
    """Yield the bytes of every range in order: fewer where a file ends early, None where there is no file.

    Remote ranges are fetched all at once; neighbours in a file are read as one, from a server also those with at most
    `gap` bytes between them. All files lie on one server, or none does. Raises `StoreUnreachable` if a server does
    not answer, `UnreadableFile` if the system refuses.
    """
    if any(isinstance(piece.file, RemotePath) for piece in ranges):
        yield from _read_remote(ranges, gap)
        return
    runs = _runs(ranges)
    wholes = local_files.read_ranges([(cast(Path, run[0].file), run[0].start, run[-1].stop) for run in runs])
    for run, whole in zip(runs, wholes, strict=True):
        yield from _split(whole, run)


def _read_remote(ranges: Sequence[Range], gap: int) -> list[bytes | None]:
    """Return the bytes of ranges, from the mirror where it has them; what it lacks is fetched and put there."""
    names = [f"{file} {start} {stop}" for file, start, stop in ranges]
    mirrors = [piece.file.mirror if isinstance(piece.file, RemotePath) else None for piece in ranges]
    found = [mirror.get(name) if mirror else None for mirror, name in zip(mirrors, names, strict=True)]
    wanted = [number for number, data in enumerate(found) if data is None]
    runs = _runs([ranges[number] for number in wanted], gap)
    fetched = remote.fetch([(str(run[0].file), run[0].start, run[-1].stop) for run in runs])
    pieces = [data for run, whole in zip(runs, fetched, strict=True) for data in _split(whole, run)]
    for number, data in zip(wanted, pieces, strict=True):
        found[number] = data
        if (mirror := mirrors[number]) and data is not None:
            mirror.put(names[number], data)
    return found


def _runs(ranges: Sequence[Range], gap: int = 0) -> list[list[Range]]:
    """Group ranges, in order, so that in a group each range begins at most `gap` bytes after the one before it."""
    runs: list[list[Range]] = []
    for piece in ranges:
        if runs and _follows(piece, runs[-1][-1], gap):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _follows(piece: Range, before: Range, gap: int) -> bool:
    return piece.file == before.file and before.stop is not None and 0 <= piece.start - before.stop <= gap


def _split(data: bytes | None, run: Sequence[Range]) -> Sequence[bytes | None]:
    if data is None or len(run) == 1:
        return [data] * len(run)
    first = run[0].start
    return [data[piece.start - first : piece.stop and piece.stop - first] for piece in run]


def hash_of(file: AnyPath) -> str:
    """Return the blake3 of a file's bytes, in hex, read block by block; `FileNotFoundError` if it is absent."""
    return hash_file(file) if isinstance(file, Path) else remote.hash_file(file.url)


def sizes_below(folder: AnyPath, *, leave_out_unreadable: bool = False) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, as `local_files.sizes_below` does; also of a URL."""
    if isinstance(folder, Path):
        return local_files.sizes_below(folder, leave_out_unreadable=leave_out_unreadable)
    return remote.list_files(folder.url)


def copy_files(copies: Mapping[AnyPath, Path]) -> None:
    """Copy files to local paths; `FileNotFoundError` if one is absent."""
    if urls := {source.url: target for source, target in copies.items() if isinstance(source, RemotePath)}:
        remote.download(urls)
    for source, target in copies.items():
        if isinstance(source, Path):
            shutil.copyfile(source, target)
