"""Where a file of a store lies: on a local or network file system, or behind a URL that fsspec can read."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from cache.errors import NotThere
from cache.files import local_files
from cache.files.durable import hash_blocks, hash_file
from cache.files.mirror import MirrorFolder
from cache.files.remote import blocks, download, fetch, list_files, list_folder


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
    """The bytes of every range, as `iter_ranges` gives them."""
    return list(iter_ranges(ranges))


def iter_ranges(ranges: Sequence[Range]) -> Iterator[bytes | None]:
    """The bytes of every range in turn, short where a file ends early, None where there is no file.

    What is remote is fetched all at once; neighbours in a file are read as one. Raises `StoreUnreachable` if a server
    does not answer.
    """
    runs = _runs(ranges)
    if all(isinstance(run[0].file, Path) for run in runs):
        wholes = local_files.read_ranges(
            [(cast(Path, run[0].file), run[0].start, run[-1].stop) for run in runs]
        )
        for run, data in zip(runs, wholes, strict=True):
            yield from _split(data, run)
    else:
        yield from _find_remote(ranges)


def _find_remote(ranges: Sequence[Range]) -> list[bytes | None]:
    found = [_from_mirror(piece) for piece in ranges]
    wanted = [n for n, data in enumerate(found) if data is None]
    runs = _runs([ranges[n] for n in wanted])
    fetched = fetch([(str(run[0].file), run[0].start, run[-1].stop) for run in runs])
    pieces = [data for run, whole in zip(runs, fetched, strict=True) for data in _split(whole, run)]
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


def sizes_below(folder: Place, *, leave_out_unreadable: bool = False) -> dict[str, int]:
    """Size in bytes of every file below the folder, by its relative path with '/'; a link's is its target's.

    Raises `UnreadableFile` for a folder that the system refuses to list, unless such are left out.
    """
    if isinstance(folder, Path):
        return local_files.sizes_below(folder, leave_out_unreadable=leave_out_unreadable)
    return list_files(folder.url)


def copy_files(copies: Mapping[Place, Path]) -> None:
    """Copy files to local paths; `FileNotFoundError` if one is absent."""
    remote = {source.url: target for source, target in copies.items() if isinstance(source, RemotePath)}
    if remote:
        download(remote)
    for source, target in copies.items():
        if isinstance(source, Path):
            shutil.copyfile(source, target)
