"""LLaVA annotations (JSON list or JSONL) to checked records; a bad entry comes with its reason."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.conversation import check_conversations
from pipeline.data.media import check_media
from pipeline.data.shards import parse_record
from pipeline.errors import BadSample, PackError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One good entry. `line` counts a JSONL file's lines or a JSON list's entries, from 1.

    `id` is the entry's own, or else made of file and line; `repeat` counts the entries with this id, from 1.
    `fields` is the entry as it was; `images` are its image paths below the image folder.
    """

    line: int
    id: str
    repeat: int
    fields: dict[str, Any]
    images: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """One entry that cannot be used, with its id if it is an object."""

    line: int
    id: str | None
    error: BadSample


def read_annotations(path: Path, image_folder: Path) -> Iterator[Record | BadRecord]:
    """Every entry in order, good or bad: what becomes of one changes no other's id or `repeat`.

    `.jsonl` and `.ndjson` are read line by line, anything else as one JSON list. Raises `PackError` if the
    file as a whole cannot be read. Image files are not looked at.
    """
    if not path.is_file():
        raise PackError(f"No annotations at {path}; name a LLaVA JSON or JSONL file.")
    entries = _lines(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _list(path)
    repeats: Counter[str] = Counter()
    for line, entry in entries:
        identity = None
        try:
            fields = _object(entry)
            identity = _id(fields, made=f"{path.stem}-{line}")
            repeats[identity] += 1
            images = image_paths(fields.get("image"), image_folder)
            check_media(fields, num_images=len(images))
            check_conversations(fields.get("conversations"), num_images=len(images))
        except BadSample as error:
            yield BadRecord(line, identity, error)
        else:
            yield Record(line, identity, repeats[identity], fields, images)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadSample]]:
    _check_is_no_list(path)
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield line, parse_record(text)
            except BadSample as error:
                yield line, error


def _check_is_no_list(path: Path) -> None:
    """Raise `PackError` for one JSON list: line by line it would be as many broken entries as it has lines."""
    with open(path, "rb") as file:
        lines = (text.removeprefix(BYTE_ORDER_MARK).strip() for text in file)
        filled = (text for text in lines if text)
        first, second = next(filled, b""), next(filled, b"")
    if first.startswith(b"[") and not (second and first.endswith(b"]")):
        raise PackError(f"{path} holds one JSON list, not an entry a line; name it .json.")


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


def _object(entry: Any) -> dict[str, Any]:
    if isinstance(entry, BadSample):
        raise entry
    if not isinstance(entry, dict):
        raise BadSample("JSON is no object", type(entry).__name__)
    return entry


def _id(fields: dict[str, Any], *, made: str) -> str:
    """The entry's id as text, or `made` if it has none."""
    value = fields.get("id")
    if value is None or value == "":
        value = made
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample("id is no text", f"found {reprlib.repr(value)}")
    if not _is_unicode(str(value)):
        raise BadSample("id is no text", "it is not valid Unicode")
    return str(value)


def image_paths(value: Any, image_folder: Path) -> tuple[str, ...]:
    """The paths of `image` (one, a list of them, or none), each below the image folder."""
    paths = value if isinstance(value, list) else [value]
    if all(path is None or path == "" for path in paths):
        return ()
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise BadSample("image is no path", reprlib.repr(path))
    return tuple(_below(path, image_folder) for path in paths)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _below(path: str, image_folder: Path) -> str:
    """A path from the image folder on; raises `BadSample` if it is elsewhere."""
    normal = os.path.normpath(path)
    if os.path.isabs(normal):
        normal = _from_folder(normal, image_folder)
    # By the text alone: folders inside the image folder may well be links to other disks.
    if os.path.isabs(normal) or normal.split("/")[0] == ".." or normal == ".":
        raise BadSample("image path leaves the image folder", normal[:200])
    return normal


def _from_folder(path: str, image_folder: Path) -> str:
    """An absolute path below the image folder, however either is written, from there on; others as they are."""
    given, real = os.path.abspath(image_folder), os.path.realpath(image_folder)
    for folder, spelling in ((given, path), (real, path), (real, os.path.realpath(path))):
        if os.path.commonpath([folder, spelling]) == folder:
            return os.path.relpath(spelling, folder)
    return path
