"""The image files of a pack: reading them, and a record of each, to find later which have changed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pipeline.data.decoding import FORMATS, check_image
from pipeline.data.file_names import as_stored
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import BadSample

UNREADABLE = "unreadable image file"
# Errors of one image file. All others, of a failing disk or of too many open files, end the run.
ERRORS_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT}

State = list[int] | None  # bytes, and nanoseconds of the last change; None for a file that is not there


@dataclass(frozen=True)
class ImageFile:
    """An image file that decodes to its last byte; `ending` fits the content, `state` is that before reading."""

    ending: str
    data: bytes
    state: State


def read_image_file(image: str, folder: Path, *, max_pixels: int) -> ImageFile:
    """Read and decode an image file; raises `BadSample` if it cannot be packed."""
    try:
        path = as_stored(folder / image)
        if not path.is_file():
            raise BadSample("missing image file", image)
        state = state_of(image, folder)
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("image file too large", f"{image}, {size} bytes; the limit is {MAX_MEMBER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        if error.errno not in ERRORS_OF_ONE_FILE:
            raise
        raise BadSample(UNREADABLE, f"{image}: {error.strerror}") from error
    try:
        kind = check_image(data, max_pixels=max_pixels)
    except BadSample as error:
        raise BadSample(error.kind, f"{image}: {error.detail}") from error
    ending = path.suffix.lower().removeprefix(".")
    if FORMATS.get(ending) != kind:
        ending = next(name for name, known in FORMATS.items() if known == kind)
    return ImageFile(ending, data, state)


def state_of(image: str, folder: Path) -> State:
    """Return size and time of an image file below a folder."""
    try:
        found = as_stored(folder / image).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


@contextmanager
def recording(path: Path, *, append: bool) -> Iterator[Callable[[str, ImageFile], object]]:
    """Yield a function that records a packed image: its path, state and blake3, about 130 bytes.

    The record is forced to the disk at the end, before `pack.json`, which states how much of it is valid.
    """
    with open(path, "a" if append else "w", encoding="utf-8") as file:
        file.write("\n" if append else "")  # ends a line that a crash cut off
        yield lambda image, found: file.write(
            json.dumps([image, found.state, blake3(found.data).hexdigest()]) + "\n"
        )
        file.flush()
        os.fsync(file.fileno())


def missing_images(record: Path, folder: Path, *, size: int | None) -> list[str]:
    """Return the packed images that are not below a folder."""
    images = {image for image, _, _ in _lines(record, size)}
    return [image for image in images if state_of(image, folder) is None]


def changed_images(record: Path, folder: Path, *, size: int | None) -> list[str]:
    """Return the packed images whose bytes have changed; a removed image is not one, since the shards hold it.

    Reads only files whose size or time differs: a copied folder has new times and the same bytes.
    """
    other: dict[str, tuple[State, str]] = {}
    for image, state, digest in _lines(record, size):  # the last line of an image counts
        other.pop(image, None)
        if state_of(image, folder) not in (None, state):
            other[image] = state, digest
    return [image for image, (state, digest) in other.items() if not _is_same(image, folder, state, digest)]


def _is_same(image: str, folder: Path, state: State, digest: str) -> bool:
    now = state_of(image, folder)
    if now is None or state is None or now[0] != state[0]:
        return now is None
    return blake3(as_stored(folder / image).read_bytes()).hexdigest() == digest


def _lines(record: Path, size: int | None) -> Iterator[tuple[str, State, str]]:
    """Yield the lines in the first `size` bytes (all for None): an interrupted run wrote what follows.

    Skips a line that a crash cut off. Yields nothing for a missing record: early versions wrote none.
    """
    if not record.is_file():
        return
    with open(record, "rb") as file:
        for line in file:
            if size is not None and file.tell() > size:
                return
            with suppress(ValueError, TypeError):
                image, state, digest = json.loads(line)
                yield image, state, digest
