"""Local files: read by ranges, announced to the system first, and listed; refusals are `UnreadableFile`."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cache.errors import UnreadableFile

_CAN_ADVISE = hasattr(os, "posix_fadvise")  # not everywhere
_ENOUGH_OPEN = 512  # files: what a disk or a file server is asked for at one time

_Range = tuple[Path, int, int | None]


def read_ranges(ranges: Sequence[_Range]) -> Iterator[bytes | None]:
    """The bytes start..stop of files in turn, short where a file ends early, None where there is no file.

    A disk is given all that it is to read before the first range is waited for; of more files than may be open at one
    time, one group after another. Raises `UnreadableFile` where the system refuses.
    """
    for group in _groups(ranges, max_open()):
        yield from _read_together(group)


def max_open() -> int:
    """Files that one reading may hold open: an eighth of what the process may, for several readings at a time."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH_OPEN if limit == resource.RLIM_INFINITY else max(1, min(limit // 8, _ENOUGH_OPEN))


def size_of(file: Path) -> int | None:
    """A file's size in bytes, a link's target's; None if there is no such file. `UnreadableFile` if none can tell."""
    try:
        with _told(file):
            about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def is_there(file: Path) -> bool:
    """Whether the name exists, whatever it is. `UnreadableFile` if that cannot be told."""
    try:
        with _told(file):
            file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(folder: Path) -> list[str]:
    """Names of files and folders in a folder, sorted; none if it is absent. `UnreadableFile` if none can list it."""
    try:
        with _told(folder):
            return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def sizes_below(folder: Path, *, leave_out_unreadable: bool = False) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its relative path with '/'; a link's is its target's.

    Raises `UnreadableFile` for a folder that cannot be entered, unless such are left out.
    """
    sizes: dict[str, int] = {}
    for name in names_in(folder):
        try:
            with _told(folder / name):
                is_folder = (folder / name).is_dir()
            if is_folder and not _is_loop(folder / name):
                below = sizes_below(folder / name, leave_out_unreadable=leave_out_unreadable)
                sizes |= {f"{name}/{inner}": size for inner, size in below.items()}
            elif (size := size_of(folder / name)) is not None:
                sizes[name] = size
        except UnreadableFile:
            if not leave_out_unreadable:
                raise
    return sizes


def _is_loop(path: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _groups(ranges: Sequence[_Range], max_files: int) -> Iterator[Sequence[_Range]]:
    """The ranges in order, cut so that no group is of more files than that."""
    start, files = 0, set[Path]()
    for number, (file, _, _) in enumerate(ranges):
        if file not in files and len(files) == max_files:
            yield ranges[start:number]
            start, files = number, set[Path]()
        files.add(file)
    yield ranges[start:]


def _read_together(ranges: Sequence[_Range]) -> Iterator[bytes | None]:
    with ExitStack() as closing:
        descriptors = {file: _opened(file, closing) for file in dict.fromkeys(file for file, _, _ in ranges)}
        for file, start, stop in ranges:
            if (descriptor := descriptors[file]) is not None:
                _advise(descriptor, start, stop)
        for file, start, stop in ranges:
            descriptor = descriptors[file]
            yield None if descriptor is None else _read(file, descriptor, start, stop)


def _opened(file: Path, closing: ExitStack) -> int | None:
    try:
        with _told(file):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    closing.callback(os.close, descriptor)
    return descriptor


def _advise(descriptor: int, start: int, stop: int | None) -> None:
    if not _CAN_ADVISE:
        return
    with suppress(OSError):  # a file system may not know how
        if stop is not None:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # and nothing beyond
        os.posix_fadvise(descriptor, start, 0 if stop is None else stop - start, os.POSIX_FADV_WILLNEED)


def _read(file: Path, descriptor: int, start: int, stop: int | None) -> bytes | None:
    try:
        with _told(file):
            size = (os.fstat(descriptor).st_size if stop is None else stop) - start
            data = os.pread(descriptor, max(size, 0), start)
            while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
                data += more  # a system reads 2 GiB at most at a time
            return data
    except FileNotFoundError:
        return None


@contextmanager
def _told(file: Path) -> Generator[None]:
    """`FileNotFoundError` where there is no such file, but a folder or nothing; else `UnreadableFile`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(file)) from error
    except OSError as error:
        raise UnreadableFile(file, error) from error


def drop_from_memory(folder: Path) -> None:
    """Ask the system to drop what its memory holds of the files; it may not, and some systems cannot be asked."""
    if not _CAN_ADVISE:
        return
    for file in folder.rglob("*"):
        if file.is_file():
            with ExitStack() as closing:
                descriptor = _opened(file, closing)
                assert descriptor is not None
                os.fsync(descriptor)  # what is not written yet cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
