"""LLaVA annotations (JSON list or JSONL) to checked records; a bad entry comes with its reason."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.conversation import check_conversations
from pipeline.errors import BadSample, PackError
from pipeline.shards import parse_record


@dataclass(frozen=True)
class Record:
    """One good entry. `line` counts a JSONL file's lines or a JSON list's entries, from 1.

    `fields` is the entry as it was; `images` are its image paths below the image folder.
    """

    line: int
    id: str
    fields: dict[str, Any]
    images: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """One entry that cannot be used, with its id if it has one."""

    line: int
    id: str | None
    error: BadSample


def read_annotations(path: Path) -> Iterator[Record | BadRecord]:
    """Every entry in order; of entries with one id the first with a good conversation counts.

    `.jsonl` and `.ndjson` are read line by line, anything else as one JSON list. Raises `PackError` if the
    file as a whole cannot be read. Image files are not looked at.
    """
    if not path.is_file():
        raise PackError(f"No annotations at {path}; name a LLaVA JSON or JSONL file.")
    entries = _lines(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _list(path)
    line_of_id: dict[str, int] = {}
    for line, entry in entries:
        identity = _id_or_none(entry)
        try:
            record = _checked(line, entry)
            if record.id in line_of_id:
                raise BadSample("duplicate id", f"{record.id}, first in entry {line_of_id[record.id]}")
        except BadSample as error:
            yield BadRecord(line, identity, error)
        else:
            line_of_id[record.id] = line
            yield record


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadSample]]:
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield line, parse_record(text)
            except BadSample as error:
                yield line, error


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        entries = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise PackError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "correct it, or name it .jsonl if each line is an entry of its own."
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested or long beyond reason
        raise PackError(f"{path} is not valid JSON: {error}; save it as UTF-8.") from error
    if not isinstance(entries, list):
        raise PackError(
            f"{path} must be a JSON list of entries, found {type(entries).__name__}; wrap it in [ ]."
        )
    yield from enumerate(entries, start=1)


def _id_or_none(entry: Any) -> str | None:
    try:
        return _id(entry)
    except BadSample:
        return None


def _id(entry: Any) -> str:
    value = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadSample("missing id", "" if value is None else f"found {value!r}"[:100])
    try:
        return str(value).encode().decode()
    except UnicodeEncodeError as error:
        raise BadSample("missing id", "it is not valid Unicode") from error


def _checked(line: int, entry: Any) -> Record:
    if isinstance(entry, BadSample):
        raise entry
    if not isinstance(entry, dict):
        raise BadSample("JSON is no object", type(entry).__name__)
    identity = _id(entry)
    images = _image_paths(entry.get("image"))
    check_conversations(entry.get("conversations"), num_images=len(images))
    return Record(line, identity, entry, images)


def _image_paths(value: Any) -> tuple[str, ...]:
    """The paths of `image` (one, a list of them, or none), each below the image folder."""
    paths = [] if value is None else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path:
            raise BadSample("image is no path", repr(path)[:100])
    normal = tuple(posixpath.normpath(path) for path in paths)
    for path in normal:
        # By the text alone: folders inside the image folder may well be links to other disks.
        if path.startswith(("/", "../")) or path in (".", ".."):
            raise BadSample("image path leaves the image folder", path[:200])
    return normal
