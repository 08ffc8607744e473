"""Samples to `shard-000000.tar`, ...: a shard is whole and on the disk, or it is not there at all."""

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
PART = ".part"  # the ending of a shard that is being written

Members = Mapping[str, bytes]


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file name, samples, bytes and blake3."""

    name: str
    num_samples: int
    size_bytes: int
    digest: str


class ShardWriter:
    """Fills shards of at most `samples_per_shard`; a group stays together where one shard can hold it.

    `shards` are those that are there; further ones are numbered after them.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int, shards: Sequence[Shard] = ()) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.shards = list(shards)
        self._tar: TarWriter | None = None
        self._file: BinaryIO | None = None
        self._num_samples = 0

    def write(self, group: Iterable[tuple[str, Members]]) -> None:
        """Add a group of samples, each a key and its members' bytes by ending."""
        group = list(group)
        if self._num_samples + len(group) > self.samples_per_shard:
            self._close_shard()
        for key, members in group:
            if self._num_samples == self.samples_per_shard:
                self._close_shard()
            with writing(self.folder / self._name()):
                self._open_shard().write({"__key__": key, **members})
            self._num_samples += 1

    def finish(self) -> list[Shard]:
        """Close the last shard; gives all of them."""
        self._close_shard()
        return self.shards

    def _open_shard(self) -> TarWriter:
        if self._tar is None:
            self._file = open(self.folder / (self._name() + PART), "wb")  # noqa: SIM115 - closed by _close_shard
            # No owner, no time: the same samples are the same bytes.
            self._tar = TarWriter(self._file, encoder=False, user="", group="", mtime=0)
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        path = self.folder / self._name()
        with writing(path):
            self._tar.close()
            publish(self._file, path)
        digest = blake3().update_mmap(path).hexdigest()
        self.shards.append(Shard(self._name(), self._num_samples, path.stat().st_size, digest))
        self._tar, self._file, self._num_samples = None, None, 0

    def _name(self) -> str:
        return f"shard-{len(self.shards):06d}.tar"


def write_whole(path: Path, text: str) -> None:
    """Give a file its content so that a crash leaves the old one or the new one."""
    with writing(path), open(f"{path}{PART}", "wb") as file:
        file.write(text.encode())
        publish(file, path)


def publish(file: BinaryIO, path: Path) -> None:
    """Bring a written file to the disk, then to its name, then the name to the disk; closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
