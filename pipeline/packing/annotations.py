"""The entries of annotations as checked records; a bad entry comes with its reason."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.dialogues import Dialogue, read_dialogue
from pipeline.data.shards import parse_record
from pipeline.errors import BadSample
from pipeline.packing.images import Image, State, image_of, is_unicode
from pipeline.packing.sources import Source


@dataclass(frozen=True, slots=True)
class Record:
    """A good entry.

    `line` counts the entries of the source from 1, of JSONL its lines. `id` is the entry's own, else made of the
    source's name and line; `repeat` counts the entries with this id, from 1. `json` is the entry: unchanged if it is
    LLaVA's, else with its turns in LLaVA's form and without its images.
    """

    line: int
    id: str
    repeat: int
    json: bytes
    images: tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A bad entry, with `kind` and `detail` of its `BadSample`; `id` is None if it has no usable one.

    `images` are the image files that are the reason, each with the state of its file when it was read.
    """

    id: str | None
    line: int
    kind: str
    detail: str
    images: Mapping[str, State] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return BadSample(self.kind, self.detail).reason


def read_annotations(
    source: Source, image_folder: Path, count: Callable[[str], int]
) -> Iterator[Record | BadRecord]:
    """Yield every entry in order, good or bad; a bad entry changes no other entry's id or `repeat`.

    `count` returns how often it was given an id. Opens no image file. Raises `PackError` if the source as a whole
    cannot be read.
    """
    for line, entry in source.entries():
        identity = None
        try:
            if isinstance(entry, BadSample):
                raise entry
            fields = parse_record(entry) if isinstance(entry, bytes) else entry
            if not isinstance(fields, dict):
                raise BadSample("JSON is no object", type(fields).__name__)
            identity = _id(fields, default=f"{source.name}-{line}")
            repeat = count(identity)
            dialogue = read_dialogue(fields)
            images = tuple(image_of(image, image_folder) for image in dialogue.images)
            yield Record(line, identity, repeat, _json(fields, dialogue, images), images)
        except BadSample as error:
            yield BadRecord(identity, line, error.kind, error.detail)
        except RecursionError as error:  # JSON can be parsed a little deeper than it can be written
            yield BadRecord(identity, line, "broken JSON", str(error))


def _json(fields: Mapping[str, Any], dialogue: Dialogue, images: tuple[Image, ...]) -> bytes:
    if not (dialogue.is_llava and all(isinstance(image, str) for image in images)):
        others = {name: value for name, value in dialogue.metadata(fields).items() if name != dialogue.column}
        fields = {**others, "conversations": dialogue.turns}
    return json.dumps(fields, default=_plain).encode()


def _plain(value: object) -> object:
    """Return what JSON can say of a value that only Parquet can hold, such as a time, or the number of raw bytes."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _id(fields: Mapping[str, Any], *, default: str) -> str:
    value = fields.get("id")
    if value is None or value == "":
        value = default
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample("id is no text", f"found {reprlib.repr(value)}")
    if not is_unicode(str(value)):
        raise BadSample("id is no text", "it is not valid Unicode")
    return str(value)
