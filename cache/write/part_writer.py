"""Writes one part: takes encoded samples, then publishes all of them by one rename, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cache.errors import ArrayMismatch, CountMismatch, DuplicateImage, DuplicateKey, PartClosed, UnknownImage
from cache.format.codecs import Array, StoredArray, encode_rows, stored_arrays
from cache.format.documents import document_bytes
from cache.format.index import PartIndex
from cache.format.layout import INDEX, REJECTS
from cache.format.records import Counts, PartRecord, rejects_bytes
from cache.format.schema import Manifest, Owner, SampleEntry
from cache.write.part_folder import PartFolder
from cache.write.taken_keys import TakenKeys


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

    Samples are encoded as they come and kept as codes, so a part needs its codes in memory; nothing is on the disk
    before `commit`. They may come in any order: they are written by `place`, and images as samples first need them.
    """

    def __init__(
        self, store: Path, manifest: Manifest, *, name: str, source: Mapping[str, Any], taken: TakenKeys
    ) -> None:
        self._store, self._manifest, self._name, self._source = store, manifest, name, dict(source)
        self._taken = taken
        self._is_open = False
        self._samples: list[_Sample] = []
        self._keys: set[str] = set()
        self._images: dict[str, dict[str, Array]] = {}  # codes by stored name, by digest
        self._rejects: list[tuple[int, str, str]] = []

    def __enter__(self) -> PartWriter:
        self._is_open = True
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

    def taken_elsewhere(self) -> list[tuple[str, str]]:
        """(key, part) of every sample added here whose key another part holds by now."""
        self._taken.refresh()
        found = [(s.entry.key, self._taken.other_part(s.entry.key, than=self._name)) for s in self._samples]
        return [(key, part) for key, part in found if part is not None]

    def withdraw(self, key: str, reason: str) -> None:
        """Turn a sample that was added into a rejected one."""
        self._check_open()
        [sample] = [sample for sample in self._samples if sample.entry.key == key]
        self._samples.remove(sample)
        self._keys.remove(key)
        self._rejects.append((sample.place, key, reason))

    def commit(
        self,
        *,
        seen: int | None = None,
        seconds: float | None = None,
        replace: bool = False,
        may_hold_fewer: bool = False,
    ) -> PartSummary:
        """Publish the part. `seen`, if given, is the caller's own count of samples and must add up; `seconds` is
        what it cost to make, kept in the record. With `replace` the part that is there makes room for this one; it
        stays if it holds more samples, unless `may_hold_fewer`.

        After a crash at any moment the part is either wholly there or still to do. Raises `DuplicateKey` if a part
        published meanwhile holds one of the keys, `HoldsFewer`, and `CorruptPart` or `UnreadableFile` if there is a
        part in the way of which it cannot be told whether it is finished.
        """
        self._check_open()
        self._check_count(seen)
        folder = PartFolder(self._store, self._name)
        try:
            record = self._write(folder, seconds=seconds)
            winner = folder.publish(
                record, replace=replace, may_hold_fewer=may_hold_fewer, check=self._check_keys
            )
        finally:
            folder.remove()
            self._close()
        return _summary(winner or record, self._manifest, already_done=winner is not None)

    def _write(self, folder: PartFolder, *, seconds: float | None) -> PartRecord:
        """All files of the part but its done-mark, which is returned."""
        samples = sorted(self._samples, key=lambda sample: sample.place)
        digests = list(dict.fromkeys(digest for sample in samples for digest in sample.entry.images))
        self._write_arrays(folder, samples, digests)
        row_counts = {name: [s.rows[name] for s in samples] for name in self._sample_owned()}
        index = PartIndex.of([sample.entry for sample in samples], digests, row_counts=row_counts)
        folder.write(INDEX, document_bytes(index.to_json()))
        folder.write(REJECTS, rejects_bytes([(key, reason) for _, key, reason in sorted(self._rejects)]))
        return PartRecord(
            part=self._name,
            contents=self._manifest.contents_digest(),
            source=self._source,
            counts=self._counts(images=len(digests)),
            seconds=seconds,
            files=folder.files,
        )

    def _check_keys(self) -> None:
        for key, part in self.taken_elsewhere():
            raise DuplicateKey(key, parts=(part, self._name))

    def _check_open(self) -> None:
        if not self._is_open:
            raise PartClosed(self._name)

    def _close(self) -> None:
        self._is_open = False
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

    def _check_count(self, seen: int | None) -> None:
        cached, rejected = len(self._samples), len(self._rejects)
        if seen is not None and seen != cached + rejected:
            raise CountMismatch(self._name, seen=seen, cached=cached, rejected=rejected)

    def _counts(self, *, images: int) -> Counts:
        cached, rejected = len(self._samples), len(self._rejects)
        references = sum(len(sample.entry.images) for sample in self._samples)
        return Counts(cached + rejected, cached, rejected, images, references)

    def _write_arrays(self, folder: PartFolder, samples: Sequence[_Sample], digests: Sequence[str]) -> None:
        arrays = [(spec, stored) for spec in self._manifest.arrays for stored in stored_arrays(spec)]
        folder.write_groups([stored.name(spec) for spec, stored in arrays])
        by_image = [self._images[digest] for digest in digests]
        by_sample = [sample.codes for sample in samples]
        for spec, stored in arrays:
            # Taken out as they are written, so that memory falls from here on.
            pieces = [
                codes.pop(stored.name(spec)) for codes in (by_image if spec.owner == "image" else by_sample)
            ]
            axes = spec.axes.split()[: 1 + len(stored.row_shape)]
            folder.write_array(stored.name(spec), stored, rows=_joined(pieces, stored), axes=axes)


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
