"""Tells what a store holds: teacher, arrays and their sizes, samples, rejects, parts, provenance."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.format.codecs import CODECS, stored_arrays
from cache.format.documents import canonical_json, digest_of, document_bytes
from cache.format.layout import GROUP_METADATA, ZARR_METADATA
from cache.format.schema import ArraySpec
from cache.read.part_reader import FinishedPart
from cache.read.reader import Store


@dataclass(frozen=True)
class ArraySummary:
    """One array of the manifest over all finished parts."""

    name: str
    axes: str
    row_shape: tuple[int, ...]
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
    content: str  # blake3 of what is stored: equal stores, however often their making was disturbed
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(path: str | Path) -> Summary:
    """Read from the records of the finished parts; no array is opened."""
    store = Store(path)
    parts = [FinishedPart(store.path, name, manifest=store.manifest) for name in store.parts]
    counts = [part.record.counts for part in parts]
    samples = sum(count.cached for count in counts)
    images = sum(count.images for count in counts)
    references = sum(count.image_references for count in counts)
    total_bytes = _bytes(store, parts)
    reasons = Counter(reason for part in store.parts for _, reason in store.rejects(part))
    return Summary(
        path=str(store.path),
        teacher=store.manifest.teacher,
        capture=store.manifest.capture,
        fingerprint=store.manifest.fingerprint.to_json(),
        arrays=tuple(_array(spec, parts, samples=samples) for spec in store.manifest.arrays),
        samples=samples,
        rejected=sum(count.rejected for count in counts),
        rejects_by_reason=dict(reasons.most_common()),
        parts_done=len(parts),
        parts_planned=len(store.manifest.planned_parts),
        distinct_images=images,
        image_references=references,
        dedupe_factor=references / images if images else 1.0,
        bytes=total_bytes,
        bytes_per_sample=total_bytes / max(1, samples),
        teacher_seconds=_seconds(parts),
        content=_content(store, parts),
        provenance=store.manifest.provenance,
    )


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
    """Of every finished part, by the records alone."""
    store = Store(path)
    return [_sizes(FinishedPart(store.path, name, manifest=store.manifest), store) for name in store.parts]


def _sizes(part: FinishedPart, store: Store) -> PartSizes:
    files = {name: file.bytes for name, file in part.record.files.items()}
    fixed = sum(size for name, size in files.items() if name.endswith(ZARR_METADATA))
    arrays = {
        spec.name: part.record.array_bytes(spec) - _metadata_bytes(spec, files)
        for spec in store.manifest.arrays
    }
    return PartSizes(
        samples=part.record.counts.cached,
        rejected=part.record.counts.rejected,
        fixed_bytes=fixed + _record_bytes(part),
        array_bytes=arrays,
        other_bytes=sum(files.values()) - fixed - sum(arrays.values()),
        seconds=part.record.seconds,
    )


def _metadata_bytes(spec: ArraySpec, files: dict[str, int]) -> int:
    return sum(files[f"{stored.name(spec)}/{ZARR_METADATA}"] for stored in stored_arrays(spec))


def _content(store: Store, parts: list[FinishedPart]) -> str:
    """Of all that readers see: what the store is for, what is planned, and the files of every part.

    Not of times: neither how long a part took nor when its shard was copied (names in `source` that end in `_ns`).
    """
    records = {part.record.part: [_timeless(part.record.source), asdict(part.record.counts),
                                  {name: file.blake3 for name, file in part.record.files.items()}]
               for part in parts}  # fmt: skip
    return digest_of([store.manifest.contents_digest(), list(store.manifest.planned_parts), records])


def _timeless(source: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in source.items() if not name.endswith("_ns")}


def _bytes(store: Store, parts: list[FinishedPart]) -> int:
    """Of the manifest, the two groups above the parts, and every finished part: what is shared, and no more."""
    listed = sum(file.bytes for part in parts for file in part.record.files.values())
    above = len(document_bytes(store.manifest.to_json())) + 2 * len(canonical_json(GROUP_METADATA))
    return above + listed + sum(_record_bytes(part) for part in parts)


def _record_bytes(part: FinishedPart) -> int:
    """Of part.json, which is written in one spelling only."""
    return len(document_bytes(part.record.to_json()))


def _seconds(parts: list[FinishedPart]) -> float | None:
    seconds = [part.record.seconds for part in parts if part.record.seconds is not None]
    return sum(seconds) if parts and len(seconds) == len(parts) else None


def _array(spec: ArraySpec, parts: list[FinishedPart], *, samples: int) -> ArraySummary:
    stored_bytes = sum(part.record.array_bytes(spec) for part in parts)
    return ArraySummary(
        name=spec.name,
        axes=spec.axes,
        row_shape=spec.row_shape,
        owner=spec.owner,
        codec=spec.codec,
        options=dict(spec.options),
        stated_error=CODECS[spec.codec].stated_error(spec.options),
        rows=sum(part.index.num_rows(spec) for part in parts),
        bytes=stored_bytes,
        bytes_per_sample=stored_bytes / max(1, samples),
    )
