"""Writes one part: takes samples and encodes them, then publishes all of them by one rename, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cache.errors import DuplicateKey, MisusedWriter
from cache.format.arrays import array_files, ragged_chunk
from cache.format.codec import Array
from cache.format.codecs import stored_arrays
from cache.format.documents import document_bytes
from cache.format.index import PartIndex
from cache.format.layout import INDEX, REJECTS
from cache.format.records import Counts, PartRecord, rejects_bytes
from cache.format.schema import ArraySpec, Manifest, Owner, SampleEntry
from cache.write.encoding import Values, check_tokens, image_codes, sample_codes
from cache.write.part_folder import PartFolder
from cache.write.taken_keys import TakenKeys


@dataclass(frozen=True)
class PartSummary(Counts):
    """What the store now holds of a part; `already_done`: another writer was first, and this is its part."""

    part: str
    array_bytes: dict[str, int]  # on the disk, by array name
    already_done: bool


class _Image(NamedTuple):
    tokens: int
    grid: tuple[int, int]
    codes: dict[str, Array]  # by stored name


class _Sample(NamedTuple):
    order: int
    entry: SampleEntry
    codes: dict[str, Array]  # by stored name
    rows: dict[str, int]  # by array


class _Reject(NamedTuple):
    order: int
    key: str
    reason: str


class PartWriter:
    """A context manager; left without `commit`, it leaves nothing behind.

    Samples are encoded as they come, so a part needs memory for its codes; nothing is on the disk before `commit`.
    They may come in any order: they are written by `order`, and images as samples first need them.
    """

    def __init__(
        self, store: Path, manifest: Manifest, *, name: str, source: Mapping[str, Any], taken: TakenKeys
    ) -> None:
        self._store, self._manifest, self._name, self.source = store, manifest, name, dict(source)
        self._taken = taken
        self._is_open = False
        self._samples: dict[str, _Sample] = {}  # by key
        self._images: dict[str, _Image] = {}  # by name
        self._rejects: list[_Reject] = []

    def __enter__(self) -> PartWriter:
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def has_image(self, name: str) -> bool:
        return name in self._images

    def add_image(
        self, name: str, arrays: Mapping[str, Array], *, tokens: int = 0, grid: tuple[int, int] = (0, 0)
    ) -> None:
        """Add the image-owned arrays of one image, each '1 *row_shape', a ragged one '1 *leading tokens'.

        All or none are kept. `name` is the image's digest, or '<digest>:<variant>'. `tokens` is the number of its
        vision tokens, `grid` their rows and columns, (0, 0) if they form no single rectangle.
        """
        self._check_open()
        if name in self._images:
            raise MisusedWriter(
                f"Image {name} was already added to part {self._name!r}; ask has_image first: one is stored once."
            )
        specs = self._owned("image")
        check_tokens(
            name, tokens, grid, ragged=[spec.name for spec in self._manifest.arrays if spec.is_ragged]
        )
        self._images[name] = _Image(tokens, grid, image_codes(specs, arrays, tokens=tokens))

    def add(
        self,
        entry: SampleEntry,
        arrays: Mapping[str, Values],
        *,
        order: int | None = None,
    ) -> None:
        """Add the sample-owned arrays of one sample, each 'rows *row_shape'; all or none are kept.

        A ragged array is a list of blocks 'rows *leading tokens', one for each image in order, of as many rows each.
        `order` sorts the samples of the part; by default they stay in the order in which they come.
        """
        self._check_open()
        if entry.key in self._samples:
            raise DuplicateKey(entry.key, parts=(self._name, self._name))
        for image in entry.images:
            if image not in self._images:
                raise MisusedWriter(
                    f"Sample {entry.key!r} points at image {image}, which part {self._name!r} does not hold; "
                    "call add_image before add."
                )
        tokens = [self._images[image].tokens for image in entry.images]
        codes, rows = sample_codes(self._owned("sample"), arrays, tokens=tokens)
        self._samples[entry.key] = _Sample(self._next(order), entry, codes, rows)

    def reject(self, key: str, reason: str, *, order: int | None = None) -> None:
        self._check_open()
        self._rejects.append(_Reject(self._next(order), key, reason))

    def taken_elsewhere(self) -> list[tuple[str, str]]:
        """Return (key, part) of every sample added here whose key another part holds by now."""
        self._taken.refresh()
        found = [(key, self._taken.other_part(key, than=self._name)) for key in self._samples]
        return [(key, part) for key, part in found if part is not None]

    def withdraw(self, key: str, reason: str) -> None:
        """Turn a sample that was added into a rejected one."""
        self._check_open()
        self._rejects.append(_Reject(self._samples.pop(key).order, key, reason))

    def commit(
        self,
        *,
        seen: int | None = None,
        seconds: float | None = None,
        replace: bool = False,
        may_hold_fewer: bool = False,
    ) -> PartSummary:
        """Publish the part. After a crash at any moment it is either wholly there or still to do.

        `seen`, if given, is the caller's own count of samples and must add up; `seconds`, the cost of making the
        part, goes into its record. With `replace` the part that is there makes room for this one; it stays if it
        holds more samples, unless `may_hold_fewer`.

        Raises `DuplicateKey` if a part published meanwhile holds one of the keys, `HoldsFewer`, and `CorruptPart` or
        `UnreadableFile` if there is a part in the way that may be finished, but cannot be read.
        """
        self._check_open()
        cached, rejected = len(self._samples), len(self._rejects)
        if seen not in (None, cached + rejected):
            raise MisusedWriter(
                f"Part {self._name!r}: {seen} samples were seen, but {cached} cached + {rejected} rejected = "
                f"{cached + rejected}; add or reject every sample before commit."
            )
        folder = PartFolder(self._store, self._name)
        try:
            record = self._write(folder, seconds=seconds)
            found = folder.publish(
                record, replace=replace, may_hold_fewer=may_hold_fewer, check=self._check_keys
            )
        finally:
            folder.remove()
            self._close()
        record = found or record
        return PartSummary(
            **vars(record.counts),
            part=record.part,
            array_bytes={spec.name: record.array_bytes(spec) for spec in self._manifest.arrays},
            already_done=found is not None,
        )

    def _write(self, folder: PartFolder, *, seconds: float | None) -> PartRecord:
        """Write all files of the part but its done-mark, and return the content of that."""
        samples = sorted(self._samples.values(), key=lambda sample: sample.order)
        entries = [sample.entry for sample in samples]
        references = [digest for entry in entries for digest in entry.images]
        digests = list(dict.fromkeys(references))
        self._write_arrays(folder, samples, digests)
        row_counts = {name: [sample.rows[name] for sample in samples] for name in self._owned("sample")}
        images = [self._images[digest] for digest in digests]
        index = PartIndex.of(
            entries,
            digests,
            row_counts=row_counts,
            tokens=[image.tokens for image in images],
            grids=[image.grid for image in images],
        )
        folder.write(INDEX, document_bytes(index.to_json()))
        folder.write(REJECTS, rejects_bytes([(one.key, one.reason) for one in sorted(self._rejects)]))
        cached, rejected = len(samples), len(self._rejects)
        return PartRecord(
            part=self._name,
            contents=self._manifest.contents_digest(),
            source=self.source,
            counts=Counts(cached + rejected, cached, rejected, len(digests), len(references)),
            seconds=seconds,
            files=folder.files,
        )

    def _write_arrays(self, folder: PartFolder, samples: Sequence[_Sample], digests: Sequence[str]) -> None:
        arrays = [(spec, stored) for spec in self._manifest.arrays for stored in stored_arrays(spec)]
        folder.write_groups([stored.name(spec) for spec, stored in arrays])
        by_owner = {
            "image": [self._images[digest].codes for digest in digests],
            "sample": [sample.codes for sample in samples],
        }
        tokens = [self._images[digest].tokens for digest in digests]
        for spec, stored in arrays:
            name, empty = stored.name(spec), np.empty((0, *stored.row_shape), dtype=stored.dtype)
            # Taken out as they are written, so that the memory in use falls from here on.
            rows = np.concatenate([empty, *(codes.pop(name) for codes in by_owner[spec.owner])])
            chunk_rows, axes = None, spec.axes.split()[: rows.ndim]
            if stored.is_flat:
                mean_block = len(rows) / max(1, len(by_owner[spec.owner]))
                sizes = [math.prod(spec.shape_of(count)) for count in tokens]
                chunk_rows, axes = ragged_chunk(stored, row_sizes=sizes, mean_block=mean_block), [spec.axes]
            for file, data in array_files(stored, rows=rows, axes=axes, chunk_rows=chunk_rows).items():
                folder.write(f"{name}/{file}", data)

    def _owned(self, owner: Owner) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self._manifest.arrays if spec.owner == owner}

    def _next(self, order: int | None) -> int:
        return len(self._samples) + len(self._rejects) if order is None else order

    def _check_keys(self) -> None:
        for key, part in self.taken_elsewhere():
            raise DuplicateKey(key, parts=(part, self._name))

    def _check_open(self) -> None:
        if not self._is_open:
            raise MisusedWriter(
                f"Part {self._name!r} is committed or left and takes nothing more; open a new part writer."
            )

    def _close(self) -> None:
        self._is_open = False
        self._samples.clear()
        self._images.clear()
