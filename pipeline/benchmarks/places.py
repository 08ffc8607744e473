"""Where an image of a benchmark lies: a file, a row of a Parquet file, a field of a table."""

from __future__ import annotations

import base64
import binascii
import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, reason_of

HELD_ROW_GROUPS = 2  # questions come in the order of the files: the image column of a row group is read once


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
        value = _images_of(self.path, self.row_group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise PipelineError(
                f"{self.path}: row {self.row} of row group {self.row_group} has no image bytes; download it again"
            )
        return data


@lru_cache(HELD_ROW_GROUPS)
def _images_of(path: Path, row_group: int) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(row_group, columns=["image"]).column("image")


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
        [row] = csv.reader(line.splitlines(keepends=True), delimiter="\t")
        try:
            return base64.b64decode(row[self.column], validate=True)
        except (binascii.Error, ValueError) as error:
            raise PipelineError(
                f"{self.path}: the row at byte {self.start} holds no base64 image ({error}); download it again"
            ) from error
