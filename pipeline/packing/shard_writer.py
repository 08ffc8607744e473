"""Samples to `shard-000000.tar`, ...: a shard is complete and on the disk, or it is not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from cache import hash_file, replace_file, sync_directory
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

    New shards are numbered after the finished ones in `shards`, and added to them.
    """

    def __init__(self, folder: Path, *, samples_per_shard: int, shards: list[Shard]) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.shards = shards
        self._open: TarWriter | None = None
        self._num_samples = 0

    def write(self, group: Sequence[tuple[str, Mapping[str, bytes]]]) -> None:
        """Add a group of samples, each a key and its members: ending -> bytes."""
        if self._num_samples + len(group) > self.samples_per_shard:
            self.finish()
        for key, members in group:
            if self._num_samples == self.samples_per_shard:
                self.finish()
            with writing(self._path()):
                if self._open is None:
                    file = open(f"{self._path()}{PART}", "wb")  # noqa: SIM115 - closed by `finish`
                    # No owner and no time: the same samples give the same bytes.
                    self._open = TarWriter(file, encoder=False, user="", group="", mtime=0)
                self._open.write({"__key__": key, **members})
            self._num_samples += 1

    def finish(self) -> None:
        """Finish the open shard, if any: force it to the disk and give it its name."""
        if self._open is None:
            return
        path = self._path()
        with writing(path):
            self._open.close()
            with self._open.stream as file:
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}{PART}", path)
            sync_directory(self.folder)
        digest = hash_file(path)
        self.shards.append(Shard(path.name, self._num_samples, path.stat().st_size, digest))
        self._open, self._num_samples = None, 0

    def close(self) -> None:
        """Leave an unfinished shard under its `.part` name."""
        if self._open is not None:
            with suppress(OSError):
                self._open.close()

    def _path(self) -> Path:
        return self.folder / f"shard-{len(self.shards):06d}.tar"


def write_whole(path: Path, text: str) -> None:
    """Write a text file; a crash leaves the old content or the new."""
    with writing(path):
        replace_file(path, text.encode(), scratch=Path(f"{path}{PART}"))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON for each row; a crash leaves the old content or the new."""
    scratch = Path(f"{path}{PART}")
    with writing(path), open(scratch, "w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    with writing(path):
        os.replace(scratch, path)
        sync_directory(path.parent)
