"""Annotations as a stream of entries: JSON list, JSONL, Parquet, a folder of `datasets` or a Hub repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cache import hash_file
from pipeline.data.file_names import expand_home
from pipeline.errors import PackError
from pipeline.packing.data_sets import open_data_set
from pipeline.packing.json_list import read_json_list
from pipeline.packing.tables import TABLES

# What files that are no JSON in UTF-8 begin with: gzip, zip, zstd, bzip2, xz, and texts in UTF-16.
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson")  # endings of files with an entry a line
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Entries = Iterator[tuple[int, Any]]  # each with its number from 1; of JSONL bytes that are not parsed yet


@dataclass(frozen=True)
class Source:
    """Annotations that can be read from beginning to end.

    `digest` changes with their content, and reads all of it. `holds_images` is whether images come within the
    entries, as in Parquet: these keep the source's order, since they cannot be gathered by image without reading
    everything twice.
    """

    name: str
    digest: Callable[[], str]
    entries: Callable[[], Entries]
    folder: Path
    holds_images: bool = False


def open_source(annotations: str | Path, *, subset: str | None = None, split: str | None = None) -> Source:
    """Return annotations by their path or Hub id. Raises `PackError` if nothing is there, or it cannot be read."""
    path = expand_home(annotations)
    is_table = path.suffix.lower() in TABLES
    if path.is_file() and not is_table:
        if subset or split:
            raise PackError(
                f"{path} is one file of entries, which has no subset and no split; remove the option."
            )
        read = _read_list if _is_list(path) else _read_lines
        return Source(path.stem, partial(hash_file, path), partial(read, path), path.parent)
    is_hub_id = HUB_ID.fullmatch(str(annotations)) and path.suffix.lower() not in (".json", *LINES, *TABLES)
    if path.exists() or is_hub_id:
        where = path if path.exists() else str(annotations)
        name, digest, rows = open_data_set(where, subset=subset, split=split)
        folder = path if path.is_dir() else path.parent if path.exists() else Path()
        return Source(name, digest, lambda: enumerate(rows(), start=1), folder, holds_images=True)
    raise PackError(
        f"No annotations at {path}; name a JSON, JSONL or Parquet file, a folder of `datasets`, or a Hub id."
    )


# JSON


def _is_list(path: Path) -> bool:
    """Return whether a file holds one JSON list; else it holds an entry a line. Raises `PackError` for neither.

    By the name .jsonl a list is refused: read line by line, each of its lines would be a broken entry.
    """
    _check_is_text(path)
    with open(path, "rb") as file:
        lines = (text.removeprefix(BYTE_ORDER_MARK).strip() for text in file)
        filled = (text for text in lines if text)
        first, second = next(filled, b""), next(filled, b"")
    if path.suffix.lower() in LINES:
        if first.startswith(b"[") and not (second and first.endswith(b"]")):
            raise PackError(f"{path} holds one JSON list, not an entry a line; name it .json.")
        return False
    return not (first.startswith(b"{") and second.startswith(b"{") and first.endswith(b"}"))


def _check_is_text(path: Path) -> None:
    """Raise `PackError` for a file that is known to be no JSON in UTF-8, with what to do."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(COMPRESSED):
        raise PackError(f"{path} is compressed, which is not read; unpack it first.")
    if start.startswith(UTF_16):
        raise PackError(f"{path} is UTF-16, which is not read; save it as UTF-8.")
    if path.suffix.lower() in (".csv", ".tsv"):
        raise PackError(f"{path} is a table of texts, which is not read; save it as JSONL or Parquet.")


def _read_lines(path: Path) -> Entries:
    """Yield every filled line with its number, not parsed yet."""
    with open(path, "rb") as file:
        yield from ((line, text) for line, text in enumerate(file, start=1) if text.strip())


def _read_list(path: Path) -> Entries:
    yield from enumerate(read_json_list(path), start=1)
