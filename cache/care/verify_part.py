"""Looks at one part for damage: its files against part.json, its counts, and every stored value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from cache.errors import CorruptFile, CorruptPart, ForeignPart, UnreadableFile, UnsafeName, UnsupportedFormat
from cache.files.place import Place, below, hash_of, place, sizes_below
from cache.format.codecs import StoredArray, holds_fill, stored_arrays
from cache.format.index import PartIndex
from cache.format.layout import INDEX, PART_RECORD, PARTS, REJECTS, ZARR_METADATA
from cache.format.records import FileRecord, PartRecord, read_part_record, read_rejects
from cache.format.schema import ArraySpec, Manifest
from cache.read.chunks import OpenArray, read_chunk
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
        return (
            name if folder == PARTS and (inside or self.kind in ("missing part", "unfinished part")) else ""
        )


def kind_of_extra(name: str) -> Kind:
    """What a file that the format does not know is: one that systems leave in folders, or none of these."""
    return "stray file" if _STRAY.fullmatch(name.rsplit("/", 1)[-1]) else "unexpected file"


@dataclass
class PartAudit:
    """What was found of one part; `record` and `index` are None where they could not be read."""

    store: Place
    name: str
    deep: bool
    problems: list[Problem] = field(default_factory=list)
    record: PartRecord | None = None
    index: PartIndex | None = None

    @property
    def path(self) -> Place:
        return self.store / PARTS / self.name

    def found(self, kind: Kind, file: Place, detail: str) -> None:
        self.problems.append(Problem(kind, below(file, self.store), detail))

    def attempt(self, read: Callable[[], T], *, kind: Kind) -> T | None:
        """What `read` gives; None after its error became a problem of `kind`, or of the file's bytes."""
        try:
            return read()
        except CorruptPart as error:
            self.found(_kind_of(error, otherwise=kind), error.file, error.detail)
        except UnreadableFile as error:
            self.found("unreadable", error.file, error.reason)
        except ForeignPart as error:
            self.found("foreign part", error.file, error.detail)
        except UnsupportedFormat as error:
            self.found("metadata", place(error.file), str(error))
        except UnsafeName as error:
            self.found("metadata", self.path, str(error))
        return None


def _kind_of(error: CorruptPart, *, otherwise: Kind) -> Kind:
    if not error.file.exists():
        return "missing file"
    return "checksum" if isinstance(error.__cause__, CorruptFile) else otherwise


def audit_part(store: Place, name: str, *, manifest: Manifest | None, deep: bool) -> PartAudit:
    """Everything wrong with the part; without a manifest, what can be told without knowing its arrays."""
    audit = PartAudit(store, name, deep)
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
    _check_rejects(audit, record, damaged)
    _check_sum(audit, record)
    part = manifest and audit.attempt(lambda: FinishedPart(store, name, manifest=manifest), kind="metadata")
    if manifest and part and INDEX not in damaged:
        _check_contents(audit, part, manifest=manifest, damaged=damaged)
    return audit


def _is_marked(part: Place) -> bool:
    try:
        return (part / PART_RECORD).exists()
    except OSError as error:
        raise UnreadableFile(part / PART_RECORD, error) from error


def _check_files(audit: PartAudit, record: PartRecord) -> Iterator[str]:
    """Relative names of the files that are not what part.json says; each becomes a problem."""
    found = audit.attempt(lambda: sizes_below(audit.path), kind="metadata")
    if found is None:
        return
    for name in sorted(found.keys() - record.files.keys() - {PART_RECORD}):
        audit.found(kind_of_extra(name), audit.path / name, "part.json does not list it")
    for name, recorded in sorted(record.files.items()):
        if problem := _file_problem(audit, name, recorded=recorded, found_bytes=found.get(name)):
            audit.found(problem[0], audit.path / name, problem[1])
            yield name


def _file_problem(
    audit: PartAudit, name: str, *, recorded: FileRecord, found_bytes: int | None
) -> tuple[Kind, str] | None:
    if found_bytes is None:
        return "missing file", "part.json lists it"
    if found_bytes != recorded.bytes:
        return "size", f"it has {found_bytes} bytes, part.json says {recorded.bytes}"
    if audit.deep or name.rsplit("/", 1)[-1] in _SMALL_FILES:
        try:
            digest = hash_of(audit.path / name)
        except OSError as error:
            return "unreadable", f"it cannot be read ({error.strerror})"
        if digest != recorded.blake3:
            return "checksum", f"its blake3 is {digest}, part.json says {recorded.blake3}"
    return None


def _check_rejects(audit: PartAudit, record: PartRecord, damaged: set[str]) -> None:
    if REJECTS in damaged:
        return
    rejects = audit.attempt(lambda: read_rejects(audit.path, record), kind="metadata")
    if rejects is not None and len(rejects) != record.counts.rejected:
        detail = f"it has {len(rejects)} lines, part.json counts {record.counts.rejected} rejected samples"
        audit.found("count", audit.path / REJECTS, detail)


def _check_sum(audit: PartAudit, record: PartRecord) -> None:
    counts = record.counts
    if counts.cached + counts.rejected != counts.seen:
        detail = f"{counts.cached} cached + {counts.rejected} rejected are not the {counts.seen} samples seen"
        audit.found("count", audit.path / PART_RECORD, detail)


def _check_contents(audit: PartAudit, part: FinishedPart, *, manifest: Manifest, damaged: set[str]) -> None:
    """Index and arrays; an array with a damaged file is not opened: that file is a problem already."""
    index = audit.attempt(lambda: part.index, kind="count")
    if index is None:
        return
    audit.index = index
    _check_index(audit, part.record, index)
    for spec in manifest.arrays:
        for stored in stored_arrays(spec):
            if not any(name.startswith(stored.name(spec) + "/") for name in damaged):
                _check_array(audit, part, spec=spec, stored=stored)


def _check_index(audit: PartAudit, record: PartRecord, index: PartIndex) -> None:
    counts = record.counts
    columns = {
        "samples": (len(index.keys), counts.cached),
        "distinct samples": (len(set(index.keys)), counts.cached),
        "images": (len(index.digests), counts.images),
        "image references": (len(index.image_numbers), counts.image_references),
    }
    for name, (found, counted) in columns.items():
        if found != counted:
            audit.found("count", audit.path / INDEX, f"it lists {found} {name}, part.json counts {counted}")


def _check_array(audit: PartAudit, part: FinishedPart, *, spec: ArraySpec, stored: StoredArray) -> None:
    array = audit.attempt(lambda: part.arrays([(spec, stored)])[0], kind="count")
    if array is None or not audit.deep:
        return
    for number in range(array.num_chunks):
        rows = audit.attempt(lambda number=number: read_chunk(array, number), kind="checksum")
        if rows is None:
            return
        if holds_fill(stored, rows):
            per_row = rows.reshape(len(rows), -1)
            row = next(i for i, values in enumerate(per_row) if holds_fill(stored, values))
            detail = (
                f"row {number * array.chunk_rows + row}, of {_owner_of(part, spec, array, number, row)}, "
            )
            detail += f"holds {stored.fill_value} or another value that is not finite"
            audit.found("non-finite", array.shard, detail)
            return


def _owner_of(part: FinishedPart, spec: ArraySpec, array: OpenArray, number: int, row: int) -> str:
    """The image or sample that a row of a chunk belongs to."""
    row += number * array.chunk_rows
    if spec.owner == "image":
        return f"image {part.index.digests[row]}"
    sample = int(np.searchsorted(part.index.row_offsets[spec.name], row, side="right")) - 1
    return f"sample {part.index.keys[sample]!r}"
