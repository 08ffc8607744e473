"""Samples to `shard-000000.tar`, ...: a shard is complete and on the disk, or it is not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3
from webdataset.writer import TarWriter

from pipeline.errors import writing

NAME = re.compile(r"shard-\d{6}\.tar")
PART = ".part"  # suffix of a shard that is being written


@dataclass(frozen=True)
class Shard:
    """A finished shard: file name, samples, bytes, blake3."""

    name: str
    num_samples: int
    size_bytes: int
    digest: str


class ShardWriter:
    """Fills shards of at most `samples_per_shard`; keeps a group in one shard if one can hold it.

    `shards` are the finished ones; new shards are numbered after them.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int, shards: Sequence[Shard] = ()) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.shards = list(shards)
        self._open: tuple[TarWriter, BinaryIO] | None = None
        self._num_samples = 0

    def write(self, group: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
        """Add a group of samples, each a key and its members: ending -> bytes."""
        group = list(group)
        if self._num_samples + len(group) > self.samples_per_shard:
            self._close_shard()
        for key, members in group:
            if self._num_samples == self.samples_per_shard:
                self._close_shard()
            with writing(self._path()):
                if self._open is None:
                    file = open(f"{self._path()}{PART}", "wb")  # noqa: SIM115 - closed by `publish`
                    # No owner and no time: the same samples give the same bytes.
                    self._open = TarWriter(file, encoder=False, user="", group="", mtime=0), file
                self._open[0].write({"__key__": key, **members})
            self._num_samples += 1

    def finish(self) -> list[Shard]:
        """Close the last shard and return all shards."""
        self._close_shard()
        return self.shards

    def _close_shard(self) -> None:
        if self._open is None:
            return
        path, (tar, file) = self._path(), self._open
        with writing(path):
            tar.close()
            publish(file, path)
        digest = blake3().update_mmap(path).hexdigest()
        self.shards.append(Shard(path.name, self._num_samples, path.stat().st_size, digest))
        self._open, self._num_samples = None, 0

    def _path(self) -> Path:
        return self.folder / f"shard-{len(self.shards):06d}.tar"


def write_whole(path: Path, text: str) -> None:
    """Write a text file; a crash leaves the old content or the new."""
    with writing(path), open(f"{path}{PART}", "wb") as file:
        file.write(text.encode())
        publish(file, path)


def publish(file: BinaryIO, path: Path) -> None:
    """Force a written file to the disk, close it and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
