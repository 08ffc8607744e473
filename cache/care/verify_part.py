"""Checks one part for damage: its files against part.json, its counts, and every stored value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, TypeVar

from cache.care.reading import Reading
from cache.errors import CorruptFile, CorruptPart, ForeignPart, UnreadableFile, UnsafeName, UnsupportedFormat
from cache.files.any_path import AnyPath, any_path, hash_of, sizes_below
from cache.format.codec import StoredArray
from cache.format.codecs import first_fill, holds_fill, stored_arrays
from cache.format.index import PartIndex
from cache.format.layout import INDEX, PART_RECORD, PARTS, REJECTS, ZARR_METADATA
from cache.format.records import FileRecord, PartRecord, read_part_record, read_rejects
from cache.format.schema import ArraySpec, Manifest
from cache.read.chunks import read_chunks
from cache.read.part_reader import FinishedPart

T = TypeVar("T")
Kind = Literal[
    "missing part",
    "unfinished part",
    "missing file",
    "unexpected file",
    "stray file",
    "foreign part",
    "unreadable",
    "size",
    "checksum",
    "count",
    "non-finite",
    "metadata",
]
_STRAY = re.compile(
    r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|\.ipynb_checkpoints|Thumbs\.db|desktop\.ini|\.smbdelete.*|\.fuse_hidden.*"
)
_SMALL_FILES = (ZARR_METADATA, INDEX, REJECTS)  # hashed also when not deep


@dataclass(frozen=True)
class Problem:
    """One damage: its kind, the file below the store, and what is wrong."""

    kind: Kind
    file: str  # relative to the store
    detail: str

    @property
    def part(self) -> str:
        """The part that the file belongs to; "" if it lies elsewhere, such as beside the parts."""
        folder, _, rest = self.file.partition("/")
        name, _, inside = rest.partition("/")
        is_whole_part = self.kind in ("missing part", "unfinished part")
        return name if folder == PARTS and (inside or is_whole_part) else ""


def kind_of_extra(name: str) -> Kind:
    """Return the kind of a file that the format does not know: left by a system in any folder, or unexpected."""
    return "stray file" if _STRAY.fullmatch(PurePosixPath(name).name) else "unexpected file"


@dataclass
class PartAudit:
    """What was found of one part; `record` and `index` are None if they could not be read.

    `reading` counts what a deep verification reads; None if it is not deep.
    """

    store: AnyPath
    name: str
    reading: Reading | None
    problems: list[Problem] = field(default_factory=list[Problem])
    record: PartRecord | None = None
    index: PartIndex | None = None

    @property
    def path(self) -> AnyPath:
        return self.store / PARTS / self.name

    def found(self, kind: Kind, file: AnyPath, detail: str) -> None:
        self.problems.append(Problem(kind, str(file).removeprefix(f"{self.store}/"), detail))

    def attempt(self, read: Callable[[], T], *, kind: Kind) -> T | None:
        """Return what `read` returns; if it raises, note a problem and return None.

        A corrupt file is a problem of `kind`, unless it is gone or its bytes are not those that were written.
        """
        try:
            return read()
        except CorruptPart as error:
            if not error.file.exists():
                kind = "missing file"
            elif isinstance(error.__cause__, CorruptFile):
                kind = "checksum"
            self.found(kind, error.file, error.detail)
        except UnreadableFile as error:
            self.found("unreadable", error.file, error.reason)
        except ForeignPart as error:
            self.found("foreign part", error.file, error.detail)
        except UnsupportedFormat as error:
            self.found("metadata", any_path(error.file), str(error))
        except UnsafeName as error:
            self.found("metadata", self.path, str(error))
        return None


def audit_part(store: AnyPath, name: str, *, manifest: Manifest | None, reading: Reading | None) -> PartAudit:
    """Find everything wrong with a part; without a manifest, what can be found without knowing its arrays."""
    audit = PartAudit(store, name, reading)
    if (is_marked := audit.attempt(lambda: _is_marked(audit.path), kind="metadata")) is False:
        audit.found("unfinished part", audit.path, f"it has no {PART_RECORD}")
    if not is_marked:
        return audit
    contents = manifest.contents_digest() if manifest else None
    record = audit.attempt(lambda: read_part_record(audit.path, contents=contents), kind="metadata")
    if record is None:
        return audit
    audit.record = record
    damaged = set(_check_files(audit, record))
    if REJECTS not in damaged:
        _check_rejects(audit, record)
    counts = record.counts
    if counts.cached + counts.rejected != counts.seen:
        detail = f"{counts.cached} cached + {counts.rejected} rejected are not the {counts.seen} samples seen"
        audit.found("count", audit.path / PART_RECORD, detail)
    part = manifest and audit.attempt(lambda: FinishedPart(store, name, manifest=manifest), kind="metadata")
    if manifest and part and INDEX not in damaged:
        _check_contents(audit, part, manifest=manifest, damaged=damaged)
    return audit


def _is_marked(part: AnyPath) -> bool:
    try:
        return (part / PART_RECORD).exists()
    except OSError as error:
        raise UnreadableFile(part / PART_RECORD, error) from error


def _check_files(audit: PartAudit, record: PartRecord) -> Iterator[str]:
    """Yield the relative names of the files that are not what part.json says; each becomes a problem."""
    found = audit.attempt(lambda: sizes_below(audit.path), kind="metadata")
    if found is None:
        return
    for name in sorted(found.keys() - record.files.keys() - {PART_RECORD}):
        audit.found(kind_of_extra(name), audit.path / name, "part.json does not list it")
    for name, recorded in sorted(record.files.items()):
        if problem := _file_problem(audit, name, recorded, found.get(name)):
            audit.found(problem[0], audit.path / name, problem[1])
            yield name


def _file_problem(
    audit: PartAudit, name: str, recorded: FileRecord, found_bytes: int | None
) -> tuple[Kind, str] | None:
    if found_bytes is None:
        return "missing file", "part.json lists it"
    if found_bytes != recorded.bytes:
        return "size", f"it has {found_bytes} bytes, part.json says {recorded.bytes}"
    if audit.reading or PurePosixPath(name).name in _SMALL_FILES:
        try:
            digest = hash_of(audit.path / name)
        except OSError as error:
            return "unreadable", f"it cannot be read ({error.strerror})"
        if audit.reading:
            audit.reading.advance(found_bytes)
        if digest != recorded.blake3:
            return "checksum", f"its blake3 is {digest}, part.json says {recorded.blake3}"
    return None


def _check_rejects(audit: PartAudit, record: PartRecord) -> None:
    rejects = audit.attempt(lambda: read_rejects(audit.path, record), kind="metadata")
    if rejects is not None and len(rejects) != record.counts.rejected:
        detail = f"it has {len(rejects)} lines, part.json counts {record.counts.rejected} rejected samples"
        audit.found("count", audit.path / REJECTS, detail)


def _check_contents(audit: PartAudit, part: FinishedPart, *, manifest: Manifest, damaged: set[str]) -> None:
    """Check index and arrays. An array with a damaged file is not opened: that file is a problem already."""
    index = audit.attempt(lambda: part.index, kind="count")
    if index is None:
        return
    audit.index = index
    counts = part.record.counts
    columns = {
        "samples": (len(index.keys), counts.cached),
        "distinct samples": (len(set(index.keys)), counts.cached),
        "images": (len(index.digests), counts.images),
        "image references": (len(index.images.number), counts.image_references),
    }
    for name, (found, counted) in columns.items():
        if found != counted:
            audit.found("count", audit.path / INDEX, f"it lists {found} {name}, part.json counts {counted}")
    for spec in manifest.arrays:
        for stored in stored_arrays(spec):
            if not any(name.startswith(stored.name(spec) + "/") for name in damaged):
                _check_array(audit, part, spec=spec, stored=stored)


def _check_array(audit: PartAudit, part: FinishedPart, *, spec: ArraySpec, stored: StoredArray) -> None:
    """Open an array; if deep, also decode it chunk by chunk and look for a fill value, up to the first problem."""
    array = audit.attempt(lambda: part.arrays([(spec, stored)])[0], kind="count")
    if array is None or not audit.reading:
        return
    for number in range(array.num_chunks):
        rows = audit.attempt(lambda n=number: next(read_chunks([(array, n)])), kind="checksum")
        if rows is None:
            return
        audit.reading.advance(int(array.spans[number][1]))
        if holds_fill(stored, rows):
            place = number * array.chunk_rows + first_fill(stored, rows)
            where = f"{'element' if stored.is_flat else 'row'} {place}"
            detail = f"{where}, of {part.rows.owner_at(spec, stored, place)}, holds {stored.fill_value} "
            audit.found("non-finite", array.shard, detail + "or another value that is not finite")
            return
