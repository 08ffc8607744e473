"""part.json, the done-mark of a part, and rejects.jsonl: what a part says of its files and its samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cache.errors import CorruptFile, CorruptPart, ForeignPart, SchemaError, UnsafeName, UnsupportedFormat
from cache.files.durable import hash_bytes
from cache.files.place import Place, Range, find_ranges
from cache.format.codecs import stored_arrays
from cache.format.documents import canonical_json, digest_of, read_document
from cache.format.layout import FORMAT_VERSION, PART_RECORD, REJECTS, check_file_name
from cache.format.schema import ArraySpec, check_format, expect, take

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """What became of the samples of a part, and how many images they share."""

    seen: int
    cached: int
    rejected: int
    images: int  # distinct ones, each stored once
    image_references: int  # by samples

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Counts:
        return cls(**{name: take(record, name, int, where="counts") for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class FileRecord:
    """What part.json says of one file."""

    bytes: int
    blake3: str


@dataclass(frozen=True)
class PartRecord:
    """part.json: written last, so that its presence says that all it lists was written before."""

    part: str
    contents: str  # Manifest.contents_digest() of the store that the part was written for
    source: dict[str, Any]
    counts: Counts
    seconds: float | None  # that it took to make; None if nobody measured
    files: dict[str, FileRecord]  # every file of the part but part.json, by path relative to the part

    def array_bytes(self, spec: ArraySpec) -> int:
        """Bytes on the disk of everything stored for this array."""
        folders = tuple(f"{stored.name(spec)}/" for stored in stored_arrays(spec))
        return sum(file.bytes for path, file in self.files.items() if path.startswith(folders))

    def version(self) -> str:
        """A digest of all that the record says: a part that is written again, otherwise, has another."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PartRecord:
        check_format(record, PART_RECORD)
        files = take(record, "files", dict)
        return cls(
            part=take(record, "part", str),
            contents=take(record, "contents", str),
            source=take(record, "source", dict),
            counts=Counts.from_json(take(record, "counts", dict)),
            seconds=None if record.get("seconds") is None else take(record, "seconds", float),
            files={check_file_name(name): _file_record(name, files) for name in files},
        )


def _file_record(name: str, files: Mapping[str, Any]) -> FileRecord:
    file = take(files, name, dict, where="files")
    return FileRecord(take(file, "bytes", int, where=name), take(file, "blake3", str, where=name))


def read_part_record(part: Place, *, contents: str | None = None, data: bytes | None = None) -> PartRecord:
    """part.json, checked; `contents` is what the manifest's digest must be, `data` the file's bytes, if known."""
    file = part / PART_RECORD
    record = read_part_file(file, PartRecord.from_json, data=data)
    if record.part != part.name:
        raise CorruptPart(file, f"it is the record of part {record.part!r}")
    if contents is not None and record.contents != contents:
        raise ForeignPart(file, record.part)
    return record


def read_part_file(file: Place, from_json: Callable[[dict[str, Any]], T], *, data: bytes | None = None) -> T:
    """A document of a part as a record; CorruptPart naming the file if it cannot be one."""
    try:
        return from_json(read_document(file, data))
    except CorruptFile as error:
        raise CorruptPart(error.file, error.detail) from error
    except UnsupportedFormat as error:
        raise UnsupportedFormat(file, found=error.found, readable=FORMAT_VERSION) from None
    except (SchemaError, UnsafeName) as error:
        raise CorruptPart(file, str(error)) from error


def rejects_bytes(rejects: Sequence[tuple[str, str]]) -> bytes:
    """The content of rejects.jsonl."""
    return b"".join(canonical_json({"key": key, "reason": reason}) for key, reason in rejects)


def read_rejects(part: Place, record: PartRecord) -> list[tuple[str, str]]:
    """(key, reason) of every rejected sample, from a file whose hash is the one in part.json."""
    file, recorded = part / REJECTS, record.files.get(REJECTS)
    data = find_ranges([Range(file)])[0]
    if recorded is None or data is None:
        raise CorruptPart(file, "the file is gone")
    if hash_bytes(data) != recorded.blake3:
        raise CorruptPart(file, "its blake3 is not the one in part.json")
    try:
        lines = [expect(json.loads(line), dict, field=REJECTS) for line in data.splitlines()]
        return [(take(line, "key", str), take(line, "reason", str)) for line in lines]
    except (ValueError, SchemaError) as error:
        raise CorruptPart(file, str(error)) from error
