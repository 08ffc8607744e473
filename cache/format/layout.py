"""The names of all files of a store, which names are safe, and the format version."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar, overload

from cache.errors import UnsafeName
from cache.files.any_path import AnyPath

FORMAT_VERSION = 2
READABLE = (1, 2)
"""Formats that are read and copied. Format 1 has no ragged arrays, and its index does not count tokens."""

MANIFEST = "manifest.json"
CARD = "README.md"
PARTS = "parts"
SCRATCH = "tmp"  # unfinished work
LEASES = "leases"  # which writer works on which part
LOCK = ".lock"  # held by a writer that plans or publishes
ZARR_METADATA = "zarr.json"
PART_RECORD = "part.json"
INDEX = "index.json"
REJECTS = "rejects.jsonl"

GROUP_METADATA: dict[str, object] = {"attributes": {}, "node_type": "group", "zarr_format": 3}
"""The content of every group's zarr.json; the store keeps nothing in attributes."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}")
_RESERVED = frozenset({ZARR_METADATA, PART_RECORD, INDEX, REJECTS})
_Name = TypeVar("_Name")


@overload
def part_path(store: Path, part: str) -> Path: ...
@overload
def part_path(store: AnyPath, part: str) -> AnyPath: ...
def part_path(store: AnyPath, part: str) -> AnyPath:
    """Return a part's directory. Raises `UnsafeName` if the name could leave the store."""
    return store / PARTS / check_part_name(part)


def check_part_name(name: str) -> str:
    """Return `name` if it is one safe path segment, else raise `UnsafeName`."""
    return _checked("a part", name, [name])


def check_array_name(name: str) -> str:
    """Return `name` if it is safe path segments joined by '/', else raise `UnsafeName`."""
    return _checked("an array", name, str(name).split("/"))


def check_file_name(name: str) -> str:
    """Return `name` if it is a relative path that stays inside a part, else raise `UnsafeName`."""
    return _checked("a file", name, name.split("/"), reserved=frozenset())


def _checked(
    kind: str, name: _Name, segments: Iterable[object], *, reserved: frozenset[str] = _RESERVED
) -> _Name:
    for segment in segments:
        if not isinstance(segment, str) or not _SEGMENT.fullmatch(segment) or segment in reserved:
            raise UnsafeName(kind, name)
    return name
