"""Writes one part: takes encoded samples, then publishes all of them by one rename, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache.arrays import write_array, write_group
from cache.codecs import Array, StoredArray, encode_rows, stored_arrays
from cache.documents import document_bytes
from cache.durable import files_below, hash_file, publish, sync_directory, sync_tree, write_file
from cache.errors import (
    ArrayMismatch,
    CorruptFile,
    CountMismatch,
    DuplicateImage,
    DuplicateKey,
    PartClosed,
    UnknownImage,
)
from cache.index import PartIndex
from cache.layout import INDEX, PART_RECORD, REJECTS, parent_groups, part_path
from cache.records import Counts, FileRecord, PartRecord, read_part_record, rejects_bytes
from cache.schema import Manifest, Owner, SampleEntry
from cache.scratch import new_scratch, remove


@dataclass(frozen=True)
class PartSummary:
    """What the store now holds of a part; `already_done`: another writer was first, and this is its part."""

    part: str
    seen: int
    cached: int
    rejected: int
    images: int
    array_bytes: dict[str, int]  # on the disk, by array name
    already_done: bool


@dataclass(frozen=True)
class _Sample:
    """A sample to be written: its place in the part, codes by stored name, rows by array."""

    place: int
    entry: SampleEntry
    codes: dict[str, Array]
    rows: dict[str, int]


class PartWriter:
    """A context manager; left without `commit`, it leaves nothing behind.

    Samples are encoded as they come and kept as codes, so a part needs its decompressed codes in memory. The order in
    which they come is nobody's business: they are written by `place`, and images as samples first need them.
    """

    def __init__(self, store: Path, manifest: Manifest, *, name: str, source: Mapping[str, Any]) -> None:
        self._target = part_path(store, name)
        self._store, self._manifest, self._name, self._source = store, manifest, name, dict(source)
        self._directory: Path | None = None
        self._samples: list[_Sample] = []
        self._keys: set[str] = set()
        self._images: dict[str, dict[str, Array]] = {}  # codes by stored name, by digest
        self._rejects: list[tuple[int, str, str]] = []

    def __enter__(self) -> PartWriter:
        self._directory = new_scratch(self._store, self._name)
        self._directory.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def has_image(self, digest: str) -> bool:
        return digest in self._images

    def add_image(self, digest: str, arrays: Mapping[str, Array]) -> None:
        """Add the image-owned arrays of one image, each '1 *row_shape'; all or none are kept."""
        self._check_open()
        if digest in self._images:
            raise DuplicateImage(digest, part=self._name)
        self._images[digest] = self._encode(arrays, owner="image")

    def add(self, entry: SampleEntry, arrays: Mapping[str, Array], *, place: int | None = None) -> None:
        """Add the sample-owned arrays of one sample, each 'rows *row_shape'; all or none are kept.

        `place` orders the samples of the part; by default they are in the order in which they come.
        """
        self._check_open()
        if entry.key in self._keys:
            raise DuplicateKey(entry.key, parts=(self._name, self._name))
        for digest in entry.images:
            if digest not in self._images:
                raise UnknownImage(digest, key=entry.key, part=self._name)
        codes = self._encode(arrays, owner="sample")
        rows = {name: len(arrays[name]) for name in self._sample_owned()}
        self._samples.append(_Sample(self._place(place), entry, codes, rows))
        self._keys.add(entry.key)

    def reject(self, key: str, reason: str, *, place: int | None = None) -> None:
        self._check_open()
        self._rejects.append((self._place(place), key, reason))

    def commit(self, *, seen: int | None = None, seconds: float | None = None) -> PartSummary:
        """Publish the part. `seen`, if given, is the caller's own count of samples and must add up; `seconds` is
        what it cost to make, kept in the record.

        After a crash at any moment the part is either wholly there or still to do.
        """
        directory = self._check_open()
        samples = sorted(self._samples, key=lambda sample: sample.place)
        digests = list(dict.fromkeys(digest for sample in samples for digest in sample.entry.images))
        counts = self._counts(seen, images=len(digests))
        self._write_arrays(directory, samples, digests)
        row_counts = {name: [s.rows[name] for s in samples] for name in self._sample_owned()}
        index = PartIndex.of([sample.entry for sample in samples], digests, row_counts=row_counts)
        write_file(directory / INDEX, document_bytes(index.to_json()))
        rejects = [(key, reason) for _, key, reason in sorted(self._rejects)]
        write_file(directory / REJECTS, rejects_bytes(rejects))
        record = PartRecord(
            part=self._name,
            contents=self._manifest.contents_digest(),
            source=self._source,
            counts=counts,
            seconds=seconds,
            files=describe_files(directory),
        )
        seal_part(directory, record)
        return self._publish(directory, record)

    def _check_open(self) -> Path:
        if self._directory is None:
            raise PartClosed(self._name)
        return self._directory

    def _close(self) -> None:
        if self._directory is not None:
            remove(self._directory)
        self._directory = None
        self._samples.clear()
        self._images.clear()

    def _encode(self, arrays: Mapping[str, Array], *, owner: Owner) -> dict[str, Array]:
        """The codes of all arrays by stored name, before any state changes."""
        specs = {spec.name: spec for spec in self._manifest.arrays if spec.owner == owner}
        for name in sorted(specs.keys() ^ arrays.keys()):
            expected = f"the arrays of one {owner}: {', '.join(specs) or 'none'}"
            raise ArrayMismatch(name, expected=expected, found=", ".join(arrays) or "none")
        encoded: dict[str, Array] = {}
        for name, spec in specs.items():
            if owner == "image" and len(arrays[name]) != 1:
                raise ArrayMismatch(name, expected="one row for one image", found=f"{len(arrays[name])} rows")
            codes = encode_rows(spec, arrays[name])
            encoded |= {stored.name(spec): codes[stored.suffix] for stored in stored_arrays(spec)}
        return encoded

    def _place(self, place: int | None) -> int:
        return len(self._samples) + len(self._rejects) if place is None else place

    def _sample_owned(self) -> list[str]:
        return [spec.name for spec in self._manifest.arrays if spec.owner == "sample"]

    def _counts(self, seen: int | None, *, images: int) -> Counts:
        cached, rejected = len(self._samples), len(self._rejects)
        if seen is not None and seen != cached + rejected:
            raise CountMismatch(self._name, seen=seen, cached=cached, rejected=rejected)
        references = sum(len(sample.entry.images) for sample in self._samples)
        return Counts(cached + rejected, cached, rejected, images, references)

    def _write_arrays(self, directory: Path, samples: Sequence[_Sample], digests: Sequence[str]) -> None:
        arrays = [(spec, stored) for spec in self._manifest.arrays for stored in stored_arrays(spec)]
        for group in parent_groups([stored.name(spec) for spec, stored in arrays]):
            write_group(directory / group)
        by_image = [self._images[digest] for digest in digests]
        by_sample = [sample.codes for sample in samples]
        for spec, stored in arrays:
            # Taken out as they are written, so that memory falls from here on.
            pieces = [
                codes.pop(stored.name(spec)) for codes in (by_image if spec.owner == "image" else by_sample)
            ]
            axes = spec.axes.split()[: 1 + len(stored.row_shape)]
            write_array(directory / stored.name(spec), stored, rows=_joined(pieces, stored), axes=axes)

    def _publish(self, directory: Path, record: PartRecord) -> PartSummary:
        winner = publish_part(directory, self._target, record, store=self._store)
        if winner is not None:
            self._close()
            return _summary(winner, self._manifest, already_done=True)
        self._directory = None
        return _summary(record, self._manifest, already_done=False)


def seal_part(directory: Path, record: PartRecord) -> None:
    """Force all that is there to the disk, and then the done-mark: it must not be there before what it lists."""
    sync_tree(directory)
    write_file(directory / PART_RECORD, document_bytes(record.to_json()))
    sync_directory(directory)


def publish_part(directory: Path, target: Path, record: PartRecord, *, store: Path) -> PartRecord | None:
    """Rename a finished part to its place; None, or the record of the part that another writer put there first.

    What lies in the way and is no finished part is replaced.
    """
    while not publish(directory, target):
        try:
            return read_part_record(target, contents=record.contents)
        except CorruptFile:
            aside = new_scratch(store, f"{target.name}.damaged")
            with suppress(FileNotFoundError):  # another writer is doing the same
                publish(target, aside)
            remove(aside)
    return None


def describe_files(directory: Path) -> dict[str, FileRecord]:
    """Size and blake3 of every file below `directory`, by relative path."""
    sizes = files_below(directory)
    return {name: FileRecord(size, hash_file(directory / name)) for name, size in sizes.items()}


def _joined(pieces: list[Array], stored: StoredArray) -> Array:
    empty = np.empty((0, *stored.row_shape), dtype=stored.dtype)
    return np.concatenate([empty, *pieces])


def _summary(record: PartRecord, manifest: Manifest, *, already_done: bool) -> PartSummary:
    counts = record.counts
    return PartSummary(
        part=record.part,
        seen=counts.seen,
        cached=counts.cached,
        rejected=counts.rejected,
        images=counts.images,
        array_bytes={spec.name: record.array_bytes(spec) for spec in manifest.arrays},
        already_done=already_done,
    )
