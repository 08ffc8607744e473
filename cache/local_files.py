"""Reading local files beside the system's own memory of them: told what will be read, or asked to forget."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

_CAN_ADVISE = hasattr(os, "posix_fadvise")  # not everywhere


def read_ranges(ranges: Sequence[tuple[Path, int, int | None]]) -> Iterator[bytes | None]:
    """The bytes start..stop of files in turn, short where a file ends early, None where there is no file.

    Every file is opened once, and a disk is given all that it is to read before the first range is waited for.
    """
    with ExitStack() as closing:
        descriptors = {file: _opened(file, closing) for file in dict.fromkeys(file for file, _, _ in ranges)}
        for file, start, stop in ranges:
            if (descriptor := descriptors[file]) is not None:
                _advise(descriptor, start, stop)
        for file, start, stop in ranges:
            descriptor = descriptors[file]
            yield None if descriptor is None else _read(descriptor, start, stop)


def _opened(file: Path, closing: ExitStack) -> int | None:
    try:
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


def _read(descriptor: int, start: int, stop: int | None) -> bytes:
    size = (os.fstat(descriptor).st_size if stop is None else stop) - start
    data = os.pread(descriptor, max(size, 0), start)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
        data += more  # a system reads 2 GiB at most at a time
    return data


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
