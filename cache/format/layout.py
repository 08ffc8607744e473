"""Where everything of a store lies: every file name, every path and the format version, once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import overload

from cache.errors import UnsafeName
from cache.files.place import Place

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
CARD = "README.md"
PARTS = "parts"
SCRATCH = "tmp"
LEASES = "leases"
LOCK = ".lock"
ZARR_METADATA = "zarr.json"
PART_RECORD = "part.json"
INDEX = "index.json"
REJECTS = "rejects.jsonl"

GROUP_METADATA: dict[str, object] = {"attributes": {}, "node_type": "group", "zarr_format": 3}
"""The content of every group's zarr.json; nothing of ours is kept in attributes."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,149}")
_RESERVED = frozenset({ZARR_METADATA, PART_RECORD, INDEX, REJECTS})


def parts_path(store: Path) -> Path:
    """The directory of all parts."""
    return store / PARTS


@overload
def part_path(store: Path, part: str) -> Path: ...
@overload
def part_path(store: Place, part: str) -> Place: ...
def part_path(store: Place, part: str) -> Place:
    """A part's directory; UnsafeName if the name could leave the store."""
    return store / PARTS / check_part_name(part)


def scratch_path(store: Path) -> Path:
    """The directory of unfinished work."""
    return store / SCRATCH


def leases_path(store: Path) -> Path:
    """The directory that says which writer is at work on which part."""
    return store / LEASES


def lease_file(store: Path, part: str) -> Path:
    """A part's lease; UnsafeName if the name could leave the store."""
    return store / LEASES / check_part_name(part)


def lock_file(store: Path) -> Path:
    """The file that writers lock while they plan or publish."""
    return store / LOCK


def shard_file(array: Path, num_axes: int) -> Path:
    """The one shard file of a Zarr array: chunk (0, 0, ...) under zarr's default key encoding."""
    return array.joinpath("c", *["0"] * num_axes)


def check_part_name(name: str) -> str:
    """`name`, if it is one harmless path segment."""
    if not _is_safe(name):
        raise UnsafeName("a part", name)
    return name


def check_array_name(name: object) -> str:
    """`name`, if it is harmless path segments joined by '/'."""
    if not isinstance(name, str) or not all(_is_safe(segment) for segment in name.split("/")):
        raise UnsafeName("an array", name)
    return name


def check_file_name(name: str) -> str:
    """`name`, if it is a relative path that stays inside a part."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise UnsafeName("a file", name)
    return name


def parent_groups(names: list[str]) -> list[str]:
    """The groups above arrays of these names, '' (the part itself) first."""
    groups = {""}
    for name in names:
        segments = name.split("/")[:-1]
        groups.update("/".join(segments[: i + 1]) for i in range(len(segments)))
    return sorted(groups)


def _is_safe(segment: object) -> bool:
    return isinstance(segment, str) and bool(_SEGMENT.fullmatch(segment)) and segment not in _RESERVED
