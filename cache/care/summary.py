"""What a store holds: teacher, arrays and their sizes, samples, rejects, parts, provenance."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.format.codecs import CODECS, stored_arrays
from cache.format.documents import canonical_json, digest_of, document_bytes
from cache.format.layout import GROUP_METADATA, ZARR_METADATA
from cache.format.records import PartRecord
from cache.format.schema import ArraySpec, Manifest
from cache.read.part_reader import FinishedPart
from cache.read.reader import Store


@dataclass(frozen=True)
class ArraySummary:
    """One array of the manifest over all finished parts."""

    name: str
    axes: str
    row_shape: tuple[int | None, ...]  # None: the vision tokens of the row's image
    owner: str
    codec: str
    options: dict[str, Any]
    stated_error: str
    rows: int
    bytes: int  # on the disk
    bytes_per_sample: float


@dataclass(frozen=True)
class Summary:
    """What a store holds, over all finished parts."""

    path: str
    teacher: dict[str, Any]
    capture: dict[str, Any]
    fingerprint: dict[str, str]
    arrays: tuple[ArraySummary, ...]
    samples: int
    rejected: int
    rejects_by_reason: dict[str, int]  # the most frequent first
    parts_done: int
    parts_planned: int
    distinct_images: int  # stored rows: an image that two parts share counts twice
    image_references: int
    dedupe_factor: float  # image references for each stored image; 1 where there are none
    bytes: int
    bytes_per_sample: float
    teacher_seconds: float | None  # of all parts; None if one of them does not say
    content: str  # blake3 of what is stored; an interrupted and resumed run leaves the same one
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(path: str | Path) -> Summary:
    """Return what a store holds, from the records of its finished parts; no array is opened."""
    store = Store(path)
    manifest = store.manifest
    parts = [FinishedPart(store.path, name, manifest=manifest) for name in store.parts]
    records = [part.record for part in parts]
    samples = sum(record.counts.cached for record in records)
    images = sum(record.counts.images for record in records)
    references = sum(record.counts.image_references for record in records)
    num_bytes = _bytes(manifest, records)
    reasons = Counter(reason for part in store.parts for _, reason in store.rejects(part))
    seconds = [record.seconds for record in records if record.seconds is not None]
    return Summary(
        path=str(store.path),
        teacher=manifest.teacher,
        capture=manifest.capture,
        fingerprint=manifest.fingerprint.to_json(),
        arrays=tuple(_array(spec, parts, samples=samples) for spec in manifest.arrays),
        samples=samples,
        rejected=sum(record.counts.rejected for record in records),
        rejects_by_reason=dict(reasons.most_common()),
        parts_done=len(parts),
        parts_planned=len(manifest.planned_parts),
        distinct_images=images,
        image_references=references,
        dedupe_factor=references / images if images else 1.0,
        bytes=num_bytes,
        bytes_per_sample=num_bytes / max(1, samples),
        teacher_seconds=sum(seconds) if records and len(seconds) == len(records) else None,
        content=_content(manifest, records),
        provenance=manifest.provenance,
    )


def _array(spec: ArraySpec, parts: list[FinishedPart], *, samples: int) -> ArraySummary:
    num_bytes = sum(part.record.array_bytes(spec) for part in parts)
    return ArraySummary(
        **spec.to_json(),
        stated_error=CODECS[spec.codec].stated_error(spec.options),
        rows=sum(part.index.num_rows(spec) for part in parts),
        bytes=num_bytes,
        bytes_per_sample=num_bytes / max(1, samples),
    )


def _content(manifest: Manifest, records: list[PartRecord]) -> str:
    """Return the digest of all that readers see: what the store is for, what it plans, and the files of every part.

    Left out are how long a part took, when its shard was copied (names in `source` that end in `_ns`), and what a
    server calls the content of the file that it came from (`version`).
    """
    parts = {
        record.part: [
            {name: value for name, value in record.source.items() if not name.endswith(("_ns", "version"))},
            asdict(record.counts),
            {name: file.blake3 for name, file in record.files.items()},
        ]
        for record in records
    }
    return digest_of([manifest.contents_digest(), list(manifest.planned_parts), parts])


def _bytes(manifest: Manifest, records: list[PartRecord]) -> int:
    """Return the bytes of the manifest, of the two groups above the parts, and of every finished part."""
    above = len(document_bytes(manifest.to_json())) + 2 * len(canonical_json(GROUP_METADATA))
    files = sum(file.bytes for record in records for file in record.files.values())
    return above + files + sum(map(_record_bytes, records))


def _record_bytes(record: PartRecord) -> int:
    """Return the bytes of a part's part.json, which has only one spelling."""
    return len(document_bytes(record.to_json()))


@dataclass(frozen=True)
class PartSizes:
    """A part's bytes: those that any part of this store takes, and those that grow with its samples."""

    samples: int
    rejected: int
    fixed_bytes: int  # metadata of groups and arrays, and part.json
    array_bytes: dict[str, int]  # by array of the manifest
    other_bytes: int  # the index and the rejects
    seconds: float | None


def part_sizes(path: str | Path) -> list[PartSizes]:
    """Return the sizes of every finished part, from the records alone."""
    store = Store(path)
    parts = [FinishedPart(store.path, name, manifest=store.manifest) for name in store.parts]
    return [_sizes(part.record, store.manifest) for part in parts]


def _sizes(record: PartRecord, manifest: Manifest) -> PartSizes:
    files = {name: file.bytes for name, file in record.files.items()}
    fixed = sum(size for name, size in files.items() if name.endswith(ZARR_METADATA))
    arrays = {
        spec.name: record.array_bytes(spec)
        - sum(files[f"{stored.name(spec)}/{ZARR_METADATA}"] for stored in stored_arrays(spec))
        for spec in manifest.arrays
    }
    return PartSizes(
        samples=record.counts.cached,
        rejected=record.counts.rejected,
        fixed_bytes=fixed + _record_bytes(record),
        array_bytes=arrays,
        other_bytes=sum(files.values()) - fixed - sum(arrays.values()),
        seconds=record.seconds,
    )
