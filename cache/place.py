"""Where a file of a store lies: on a local or network file system, or behind a URL that fsspec can read."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cache.durable import files_below, hash_blocks, hash_file
from cache.errors import NotThere
from cache.mirror import MirrorFolder
from cache.remote import blocks, download, fetch, list_files, list_folder


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URL; answers what reading a store asks of a `Path`, each by one request at most."""

    url: str
    mirror: MirrorFolder | None = None  # where pieces of files below it are kept

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.mirror)

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def exists(self) -> bool:
        return find_ranges([Range(self, 0, 1)]) != [None]

    def is_file(self) -> bool:
        return self.exists()

    def is_dir(self) -> bool:
        return bool(list_folder(self.url))

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in list_folder(self.url))

    def read_bytes(self) -> bytes:
        data = find_ranges([Range(self)])[0]
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "No such file", self.url)
        return data


Place = Path | RemotePath


class Range(NamedTuple):
    """Bytes start..stop of a file; to its end without a stop."""

    file: Place
    start: int = 0
    stop: int | None = None


def place(path: str | Path | RemotePath) -> Place:
    """A path, or a URL such as s3://bucket/teacher.zarr, as something to read from."""
    if isinstance(path, RemotePath):
        return path
    text = str(path).removeprefix("file://")
    return RemotePath(text.rstrip("/")) if is_remote(text) else Path(text)


def local(path: str | Path | RemotePath, *, doing: str) -> Path:
    """A path that is a folder's, not a URL; `NotThere` says what cannot be done behind one."""
    found = place(path)
    if isinstance(found, RemotePath):
        raise NotThere(
            found, asked=f"a store behind a URL cannot be {doing}: do it in a folder, then `alignkd push`"
        )
    return found


def below(file: Place, folder: Place) -> str:
    """The path of a file relative to a folder that it lies below, with '/'."""
    return str(file).removeprefix(f"{folder}/")


def is_remote(path: str | Path) -> bool:
    """Whether the path is a URL, so that nothing can be renamed or locked there."""
    return "://" in str(path)


def find_ranges(ranges: Sequence[Range]) -> list[bytes | None]:
    """The bytes of every range, short where a file ends early, None where there is no file.

    What is remote is fetched all at once; neighbours in a file are read as one. Raises `StoreUnreachable` if a server
    does not answer.
    """
    found = [_from_mirror(piece) for piece in ranges]
    wanted = [n for n, data in enumerate(found) if data is None]
    runs = _runs([ranges[n] for n in wanted])
    read = iter(_read([Range(run[0].file, run[0].start, run[-1].stop) for run in runs]))
    pieces = [data for run in runs for data in _split(next(read), run)]
    for n, data in zip(wanted, pieces, strict=True):
        found[n] = data
        _to_mirror(ranges[n], data)
    return found


def _runs(ranges: Sequence[Range]) -> list[list[Range]]:
    """The ranges in order, those together of which each begins where the one before it stops."""
    runs: list[list[Range]] = []
    for piece in ranges:
        if runs and runs[-1][-1].stop == piece.start and runs[-1][-1].file == piece.file:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _split(data: bytes | None, run: Sequence[Range]) -> Sequence[bytes | None]:
    if data is None or len(run) == 1:
        return [data] * len(run)
    start = run[0].start
    return [data[piece.start - start : piece.stop and piece.stop - start] for piece in run]


def _read(ranges: Sequence[Range]) -> list[bytes | None]:
    remote = [n for n, piece in enumerate(ranges) if isinstance(piece.file, RemotePath)]
    fetched = fetch([(str(ranges[n].file), ranges[n].start, ranges[n].stop) for n in remote])
    found = dict(zip(remote, fetched, strict=True))
    with ExitStack() as files:
        # A disk is given all that it is to read before the first is waited for.
        opened = [
            _asked_for(piece.file, piece, files) if isinstance(piece.file, Path) else None for piece in ranges
        ]
        return [
            _read_local(file, ranges[n]) if file is not None else found.get(n)
            for n, file in enumerate(opened)
        ]


def _asked_for(path: Path, piece: Range, files: ExitStack) -> BinaryIO | None:
    """The file, whose system was told what will be read of it; None if it is absent."""
    try:
        file = files.enter_context(path.open("rb"))
    except FileNotFoundError:
        return None
    if hasattr(os, "posix_fadvise"):  # not everywhere
        length = 0 if piece.stop is None else piece.stop - piece.start
        with suppress(OSError):  # a file system may not know how
            if piece.stop is not None:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # and nothing beyond
            os.posix_fadvise(file.fileno(), piece.start, length, os.POSIX_FADV_WILLNEED)
    return file


def _read_local(file: BinaryIO, piece: Range) -> bytes:
    file.seek(piece.start)
    return file.read(-1 if piece.stop is None else piece.stop - piece.start)


def _from_mirror(piece: Range) -> bytes | None:
    mirror = piece.file.mirror if isinstance(piece.file, RemotePath) else None
    return mirror.get(_name(piece)) if mirror else None


def _to_mirror(piece: Range, data: bytes | None) -> None:
    mirror = piece.file.mirror if isinstance(piece.file, RemotePath) else None
    if mirror and data is not None:
        mirror.put(_name(piece), data)


def _name(piece: Range) -> str:
    return f"{piece.file} {piece.start} {piece.stop}"


def hash_of(file: Place) -> str:
    """blake3 of the file's bytes, in hex, read block by block; `FileNotFoundError` if it is absent."""
    return hash_file(file) if isinstance(file, Path) else hash_blocks(blocks(file.url))


def sizes_below(folder: Place) -> dict[str, int]:
    """Size in bytes of every file below the folder, by its relative path with '/'."""
    return files_below(folder) if isinstance(folder, Path) else list_files(folder.url)


def copy_files(copies: Mapping[Place, Path]) -> None:
    """Copy files to local paths; `FileNotFoundError` if one is absent."""
    remote = {source.url: target for source, target in copies.items() if isinstance(source, RemotePath)}
    if remote:
        download(remote)
    for source, target in copies.items():
        if isinstance(source, Path):
            shutil.copyfile(source, target)
