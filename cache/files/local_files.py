"""Local files: ranges that are announced to the system before they are read, sizes, listings.

A file that is absent is an answer; any other refusal of the system is `UnreadableFile`.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cache.errors import UnreadableFile

_CAN_ADVISE = hasattr(os, "posix_fadvise")  # Linux has it, macOS does not
_ENOUGH_OPEN = 512  # files: more requests at a time make neither a disk nor a file server faster

_Range = tuple[Path, int, int | None]


def read_ranges(ranges: Sequence[_Range]) -> Iterator[bytes | None]:
    """Yield the bytes start..stop of each range: fewer where the file ends early, None where there is no file.

    All ranges are announced to the system before the first one is read. Ranges of more than `max_open` files are read
    one group of files after another. Raises `UnreadableFile` where the system refuses.
    """
    for group in _groups(ranges, max_open()):
        yield from _read_together(group)


def max_open() -> int:
    """Return how many files one read may open: an eighth of the process's limit, because reads may overlap."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH_OPEN if limit == resource.RLIM_INFINITY else max(1, min(limit // 8, _ENOUGH_OPEN))


def size_of(file: Path) -> int | None:
    """Return a file's size in bytes, of a link its target's; None if there is no such file."""
    with suppress(FileNotFoundError), _system_errors(file):
        status = file.stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


def is_there(path: Path) -> bool:
    """Return whether the name exists, be it a file, a folder or a broken link."""
    with suppress(FileNotFoundError), _system_errors(path):
        path.lstat()
        return True
    return False


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; none if it is absent."""
    with suppress(FileNotFoundError), _system_errors(folder):
        return sorted(os.listdir(folder))
    return []


def sizes_below(folder: Path, *, leave_out_unreadable: bool = False) -> dict[str, int]:
    """Return the size in bytes of every file below a folder by its relative path with '/'; links are followed.

    Raises `UnreadableFile` for a folder that cannot be entered, unless `leave_out_unreadable`.
    """
    sizes: dict[str, int] = {}
    for name in names_in(folder):
        path = folder / name
        try:
            with _system_errors(path):
                is_folder = path.is_dir() and not _is_loop(path)
            if is_folder:
                below = sizes_below(path, leave_out_unreadable=leave_out_unreadable)
                sizes |= {f"{name}/{inner}": size for inner, size in below.items()}
            elif (size := size_of(path)) is not None:
                sizes[name] = size
        except UnreadableFile:
            if not leave_out_unreadable:
                raise
    return sizes


def _is_loop(path: Path) -> bool:
    """Return whether the path links to a folder that contains it."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _groups(ranges: Sequence[_Range], max_files: int) -> Iterator[Sequence[_Range]]:
    """Cut the ranges, in order, into groups of at most `max_files` files each."""
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
    with suppress(FileNotFoundError), _system_errors(file):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        closing.callback(os.close, descriptor)
        return descriptor
    return None


def _advise(descriptor: int, start: int, stop: int | None) -> None:
    """Ask the system to read a range ahead. Only a hint: file systems that cannot are no failure."""
    if _CAN_ADVISE:
        with suppress(OSError):
            if stop is not None:  # the default read-ahead would fetch neighbours that nobody asked for
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(descriptor, start, 0 if stop is None else stop - start, os.POSIX_FADV_WILLNEED)


def _read(file: Path, descriptor: int, start: int, stop: int | None) -> bytes | None:
    with suppress(FileNotFoundError), _system_errors(file):
        # Of a whole file at least one byte is read: one that seems empty may lie on a disk that fails.
        size = max(os.fstat(descriptor).st_size - start, 1) if stop is None else max(stop - start, 0)
        data = os.pread(descriptor, size, start)
        # Linux returns at most 2 GiB for one read.
        while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
            data += more
        return data
    return None


@contextmanager
def _system_errors(path: Path) -> Generator[None]:
    """Raise `FileNotFoundError` where a folder or nothing is in the file's place, else `UnreadableFile`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from error
    except OSError as error:
        raise UnreadableFile(path, error) from error


def drop_from_memory(folder: Path) -> None:
    """Ask the system to drop the files from its page cache; does nothing on systems that cannot be asked."""
    for file in folder.rglob("*") if _CAN_ADVISE else ():
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())  # only what is on the disk can be dropped
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
