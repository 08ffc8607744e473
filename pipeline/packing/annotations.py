"""LLaVA annotations (a JSON list, or JSONL) as checked records; a bad entry comes with its reason."""

from __future__ import annotations

import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.conversation import check_conversations
from pipeline.data.media import check_media
from pipeline.data.shards import parse_record
from pipeline.errors import BadSample, PackError
from pipeline.packing.images import State

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson")  # endings of files with an entry a line; every other file is one JSON list


@dataclass(frozen=True)
class Record:
    """A good entry.

    `line` counts the lines of JSONL or the entries of a JSON list, from 1. `id` is the entry's own, else made of file
    name and line; `repeat` counts the entries with this id, from 1. `json` is the entry unchanged. `images` are its
    image paths, relative to the image folder.
    """

    line: int
    id: str
    repeat: int
    json: bytes
    images: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """A bad entry, with `kind` and `detail` of its `BadSample`; `id` is None if it has no usable one.

    `images` are the images that are the reason, each with the state of its file when it was read.
    """

    id: str | None
    line: int
    kind: str
    detail: str
    images: Mapping[str, State] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return BadSample(self.kind, self.detail).reason


def read_annotations(path: Path, image_folder: Path) -> Iterator[Record | BadRecord]:
    """Yield every entry in order, good or bad; a bad entry changes no other entry's id or `repeat`.

    Opens no image file. Raises `PackError` if the file as a whole cannot be read.
    """
    repeats: Counter[str] = Counter()
    read = _read_lines if path.suffix.lower() in LINES else _read_list
    for line, entry in read(path):
        identity = None
        try:
            fields = parse_record(entry) if isinstance(entry, bytes) else entry
            if not isinstance(fields, dict):
                raise BadSample("JSON is no object", type(fields).__name__)
            identity = _id(fields, default=f"{path.stem}-{line}")
            repeats[identity] += 1
            images = _image_paths(fields.get("image"), image_folder)
            check_media(fields, num_images=len(images))
            check_conversations(fields.get("conversations"), num_images=len(images))
            yield Record(line, identity, repeats[identity], json.dumps(fields).encode(), images)
        except BadSample as error:
            yield BadRecord(identity, line, error.kind, error.detail)
        except RecursionError as error:  # JSON can be parsed a little deeper than it can be written
            yield BadRecord(identity, line, "broken JSON", str(error))


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield every filled line with its number, not parsed yet."""
    _check_is_no_list(path)
    with open(path, "rb") as file:
        yield from ((line, text) for line, text in enumerate(file, start=1) if text.strip())


def _check_is_no_list(path: Path) -> None:
    """Raise `PackError` for a JSON list: read line by line, each of its lines would be a broken entry."""
    with open(path, "rb") as file:
        lines = (text.removeprefix(BYTE_ORDER_MARK).strip() for text in file)
        filled = (text for text in lines if text)
        first, second = next(filled, b""), next(filled, b"")
    if first.startswith(b"[") and not (second and first.endswith(b"]")):
        raise PackError(f"{path} holds one JSON list, not an entry a line; name it .json.")


def _read_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        entries = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise PackError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "correct it, or name it .jsonl if each line is an entry of its own."
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
        raise PackError(f"{path} is not valid JSON: {error}; save it as UTF-8.") from error
    if not isinstance(entries, list):
        raise PackError(
            f"{path} must be a JSON list of entries, found {type(entries).__name__}; wrap it in [ ]."
        )
    yield from enumerate(entries, start=1)


def _id(fields: dict[str, Any], *, default: str) -> str:
    value = fields.get("id")
    if value is None or value == "":
        value = default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample("id is no text", f"found {reprlib.repr(value)}")
    if not _is_unicode(str(value)):
        raise BadSample("id is no text", "it is not valid Unicode")
    return str(value)


def _image_paths(value: Any, image_folder: Path) -> tuple[str, ...]:
    """Return the paths of `image` (one path, a list of them, or none), relative to the image folder."""
    paths = value if isinstance(value, list) else [value]
    if all(path is None or path == "" for path in paths):
        return ()
    for path in paths:
        if not isinstance(path, str) or not path or "\0" in path or not _is_unicode(path):
            raise BadSample("image is no path", reprlib.repr(path))
    return tuple(_relative(path, image_folder) for path in paths)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _relative(path: str, image_folder: Path) -> str:
    normal = os.path.normpath(path)
    if os.path.isabs(normal):
        # The path and the folder may each be written with or without symbolic links.
        given, real = os.path.abspath(image_folder), os.path.realpath(image_folder)
        for folder, spelling in ((given, normal), (real, normal), (real, os.path.realpath(normal))):
            if os.path.commonpath([folder, spelling]) == folder:
                normal = os.path.relpath(spelling, folder)
                break
    # Symbolic links are not followed here: a folder inside the image folder may link to another disk.
    if os.path.isabs(normal) or normal.split("/")[0] == ".." or normal == ".":
        raise BadSample("image path leaves the image folder", normal[:200])
    return normal
