"""What a pack read: size, time and blake3 of each image file, to tell later which have changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from pipeline.data.file_names import as_stored

State = list[int] | None  # bytes and nanoseconds of the last change; None where there is no file to look at


def state_of(image: str, folder: Path) -> State:
    """Size and time of an image file below a folder."""
    try:
        found = as_stored(folder / image).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


class PackedImages:
    """A file with a line for each image that went into a shard: its path, state and blake3.

    About 130 bytes an image, hence beside `pack.json` and not in it. A line that a crash cut off is passed over.
    """

    def __init__(self, path: Path, *, empty: bool) -> None:
        self._file = open(path, "w" if empty else "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._file.write("\n" if not empty else "")

    def add(self, image: str, state: State, digest: str) -> None:
        self._file.write(json.dumps([image, state, digest]) + "\n")

    def close(self) -> None:
        """Bring it to the disk: before `pack.json`, which makes it count."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def missing_images(path: Path, folder: Path, *, size: int | None) -> list[str]:
    """Packed images that are not below a folder."""
    return [
        image for image in {image for image, _, _ in _lines(path, size)} if state_of(image, folder) is None
    ]


def changed_images(path: Path, folder: Path, *, size: int | None) -> list[str]:
    """Packed images whose bytes are others now. One that is gone is none of them: the shards hold it.

    Only those whose size or time differs are read: a copied folder has new times and the same bytes.
    """
    other: dict[str, tuple[State, str]] = {}
    for image, state, digest in _lines(path, size):  # of an image's lines the last counts
        other.pop(image, None)
        if state_of(image, folder) not in (None, state):
            other[image] = state, digest
    return [image for image, (state, digest) in other.items() if not _is_same(image, folder, state, digest)]


def _is_same(image: str, folder: Path, state: State, digest: str) -> bool:
    now = state_of(image, folder)
    if now is None or state is None or now[0] != state[0]:
        return now is None
    return blake3(as_stored(folder / image).read_bytes()).hexdigest() == digest


def _lines(path: Path, size: int | None) -> Iterator[tuple[str, list[int], str]]:
    """The lines in the first `size` bytes: those behind are of a run that was interrupted, and count nothing."""
    if not path.is_file():  # packed by a version that did not keep it
        return
    with open(path, "rb") as file:
        num_read = 0
        for line in file:
            num_read += len(line)
            if size is not None and num_read > size:
                return
            try:
                image, state, digest = json.loads(line)
            except (ValueError, TypeError):
                continue
            yield image, state, digest
