"""Entries of a JSON file: a list, or an entry a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import PackError
from pipeline.packing.json_list import read_json_list

# What files that are no text in UTF-8 begin with: gzip, zip, zstd, bzip2, xz, and texts in UTF-16.
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson")  # endings of files with an entry a line
# Each with its number from 1: of JSONL bytes that are not parsed yet; a `BadSample` for what cannot be read.
Entries = Iterator[tuple[int, Any]]


def json_entries(path: Path) -> Callable[[], Entries]:
    """Return what reads the entries of a file. Raises `PackError` for a file that holds neither form."""
    return partial(_read_list if _is_list(path) else _read_lines, path)


def _is_list(path: Path) -> bool:
    """Return whether a file holds one JSON list; else it holds an entry a line. Raises `PackError` for neither.

    By the name .jsonl a list is refused: read line by line, each of its lines would be a broken entry.
    """
    check_is_text(path)
    with open(path, "rb") as file:
        lines = (text.removeprefix(BYTE_ORDER_MARK).strip() for text in file)
        filled = (text for text in lines if text)
        first, second = next(filled, b""), next(filled, b"")
    if path.suffix.lower() in LINES:
        if first.startswith(b"[") and not (second and first.endswith(b"]")):
            raise PackError(f"{path} holds one JSON list, not an entry a line; name it .json.")
        return False
    return not (first.startswith(b"{") and second.startswith(b"{") and first.endswith(b"}"))


def check_is_text(path: Path) -> None:
    """Raise `PackError` for a file that is known to be no text in UTF-8, with what to do."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(COMPRESSED):
        raise PackError(f"{path} is compressed, which is not read; unpack it first.")
    if start.startswith(UTF_16):
        raise PackError(f"{path} is UTF-16, which is not read; save it as UTF-8.")


def _read_lines(path: Path) -> Entries:
    """Yield every filled line with its number, not parsed yet."""
    with open(path, "rb") as file:
        yield from ((line, text) for line, text in enumerate(file, start=1) if text.strip())


def _read_list(path: Path) -> Entries:
    yield from enumerate(read_json_list(path), start=1)
