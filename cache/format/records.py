"""part.json, the done-mark of a part, and rejects.jsonl: what a part says of its files and its samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import InstanceOf, StrictFloat, StrictInt

from cache.errors import CorruptFile, CorruptPart, ForeignPart, SchemaError, UnsafeName, UnsupportedFormat
from cache.files.any_path import AnyPath, read_file
from cache.files.durable import hash_bytes
from cache.format.codecs import stored_arrays
from cache.format.documents import Facts, canonical_json, digest_of, read_document, validated
from cache.format.layout import FORMAT_VERSION, PART_RECORD, READABLE, REJECTS, check_file_name
from cache.format.schema import ArraySpec, check_format

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """What became of the samples of a part, and how many images they share."""

    seen: StrictInt
    cached: StrictInt
    rejected: StrictInt
    images: StrictInt  # distinct ones, each stored once
    image_references: StrictInt  # by samples


@dataclass(frozen=True)
class FileRecord:
    """What part.json says of one file."""

    bytes: StrictInt
    blake3: str


@dataclass(frozen=True)
class PartRecord:
    """The content of part.json. It is written last: where it exists, all that it lists was written before."""

    part: str
    contents: str  # Manifest.contents_digest() of the store that the part was written for
    source: Facts
    counts: Counts
    seconds: StrictFloat | None  # that it took to make; None if nobody measured
    files: dict[str, FileRecord]  # every file of the part but part.json, by path relative to the part
    format_version: StrictInt = FORMAT_VERSION

    def array_bytes(self, spec: ArraySpec) -> int:
        """Return the bytes on the disk of everything stored for this array."""
        folders = tuple(f"{stored.name(spec)}/" for stored in stored_arrays(spec))
        return sum(file.bytes for path, file in self.files.items() if path.startswith(folders))

    def version(self) -> str:
        """Return a digest of the whole record: a part that is replaced by another has another version."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PartRecord:
        check_format(record, PART_RECORD)
        made = validated(cls, {"seconds": None, **record})
        for name in made.files:
            check_file_name(name)
        return made


@dataclass(frozen=True)
class _Reject:
    key: InstanceOf[str]  # may hold half a surrogate pair, which a plain `str` field may refuse
    reason: InstanceOf[str]


def read_part_record(part: AnyPath, *, contents: str | None = None, data: bytes | None = None) -> PartRecord:
    """Return a part's part.json; `data` are the file's bytes, if they are known already.

    Raises `CorruptPart` if it is damaged, `ForeignPart` if it does not match `contents`, the manifest's digest.
    """
    file = part / PART_RECORD
    record = read_part_file(file, PartRecord.from_json, data=data)
    if record.part != part.name:
        raise CorruptPart(file, f"it is the record of part {record.part!r}")
    if contents is not None and record.contents != contents:
        raise ForeignPart(file, record.part)
    return record


def read_part_file(
    file: AnyPath, from_json: Callable[[dict[str, Any]], T], *, data: bytes | None = None
) -> T:
    """Return a JSON file of a part as a record. Raises `CorruptPart` if its bytes or its fields are wrong."""
    try:
        return from_json(read_document(file, data))
    except CorruptFile as error:
        raise CorruptPart(error.file, error.detail) from error
    except UnsupportedFormat as error:
        raise UnsupportedFormat(file, found=error.found, readable=READABLE) from None
    except (SchemaError, UnsafeName) as error:
        raise CorruptPart(file, str(error)) from error


def checked_bytes(file: AnyPath, data: bytes | None, recorded: FileRecord | None) -> bytes:
    """Return the bytes of a file of a part. Raises `CorruptPart` if it is absent or its hash is not the recorded."""
    if recorded is None or data is None:
        raise CorruptPart(file, "the file is gone")
    if hash_bytes(data) != recorded.blake3:
        raise CorruptPart(file, "its blake3 is not the one in part.json")
    return data


def rejects_bytes(rejects: Sequence[tuple[str, str]]) -> bytes:
    """Return the content of rejects.jsonl, a line for each (key, reason)."""
    return b"".join(canonical_json({"key": key, "reason": reason}) for key, reason in rejects)


def read_rejects(part: AnyPath, record: PartRecord) -> list[tuple[str, str]]:
    """Return (key, reason) of every rejected sample. Raises `CorruptPart` if the file's hash is not the recorded."""
    file = part / REJECTS
    data = checked_bytes(file, read_file(file), record.files.get(REJECTS))
    try:
        rejects = [validated(_Reject, json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError, SchemaError) as error:
        raise CorruptPart(file, str(error)) from error
    return [(reject.key, reject.reason) for reject in rejects]
