"""Where an image of a benchmark lies: a file, a row of a Parquet file, a field of a table."""

from __future__ import annotations

import base64
import binascii
import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, needing, reason_of

ROWS = 32  # images of a Parquet file in memory at once, and the page that holds them
BUFFER = 4 << 20  # bytes read at once of a Parquet file


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file of its own."""

    path: Path

    def read(self) -> bytes:
        """Return the bytes of the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise PipelineError(
                f"{self.path} cannot be read ({reason_of(error)}); put the image back"
            ) from error


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a row of a Parquet file of the Hub, as bytes or as a struct with `bytes`."""

    path: Path
    row_group: int
    row: int

    def read(self) -> bytes:
        """Return the bytes of the image."""
        with reading_parquet(self.path):
            value = _column(self.path, self.row_group).row(self.row)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise PipelineError(
                f"{self.path}: row {self.row} of row group {self.row_group} has no image bytes; download it again"
            )
        return data


@contextmanager
def reading_parquet(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises of a file into one sentence, also where the package is missing."""
    with needing("datasets", by=f"reading {file}"):
        from pyarrow import ArrowException
    try:
        yield
    except (ArrowException, OSError) as error:
        raise PipelineError(
            f"{file} cannot be read as Parquet ({reason_of(error)}); download it again"
        ) from error


class _ImageColumn:
    """The images of one row group, some rows in memory: a whole group may be gigabytes."""

    def __init__(self, path: Path, row_group: int):
        self.path, self.row_group = path, row_group
        self._begin()

    def _begin(self) -> None:
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False)
        self.batches = file.iter_batches(
            ROWS, row_groups=[self.row_group], columns=["image"], use_threads=False
        )
        self.start, self.rows = 0, []

    def row(self, number: int) -> Any:
        """Return a row's image. Questions come in the order of the files, so that this is seldom a step back."""
        if number < self.start:
            self._begin()
        while number >= self.start + len(self.rows):
            self.start += len(self.rows)
            self.rows = next(self.batches).column(0).to_pylist()
        return self.rows[number - self.start]


@lru_cache(1)
def _column(path: Path, row_group: int) -> _ImageColumn:
    return _ImageColumn(path, row_group)


@dataclass(frozen=True, slots=True)
class TableImage:
    """A base64 image in a row of a tab-separated table; `start` and `length` are the row's bytes."""

    path: Path
    start: int
    length: int
    column: int

    def read(self) -> bytes:
        """Return the bytes of the image."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            line = file.read(self.length).decode()
        # Lines end as the reader of the table ends them: U+2028 and others are no end.
        row = next(csv.reader(io.StringIO(line, newline="\n"), delimiter="\t"))
        try:
            return base64.b64decode("".join(row[self.column].split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise PipelineError(
                f"{self.path}: the row at byte {self.start} holds no base64 image ({error}); download it again"
            ) from error
