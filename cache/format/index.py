"""index.json: the samples of a part as columns, so that keys, images and row counts need no array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.errors import CorruptPart, SchemaError
from cache.files.place import Place
from cache.format.columns import Integers, Spans, Texts, compact, digests, offsets
from cache.format.layout import INDEX
from cache.format.records import read_part_file
from cache.format.schema import ArraySpec, Manifest, SampleEntry, take, take_all


@dataclass(frozen=True)
class PartIndex:
    """index.json: columns over the samples of a part, in the order in which their rows are stored."""

    keys: Sequence[str]
    digests: Sequence[str]  # distinct images; row i of every image-owned array belongs to digests[i]
    image_offsets: Integers  # CSR over samples into the two columns below
    image_numbers: Integers  # into digests
    image_spans: Spans
    json_spans: Spans
    row_offsets: dict[str, Integers]  # CSR over samples into the rows of every sample-owned array

    def entry(self, sample: int) -> SampleEntry:
        images = tuple(self.digests[number] for number in self.image_rows(sample))
        spans = self.image_spans[self._images(sample)]
        return SampleEntry(self.keys[sample], images, spans, self.json_spans[sample])

    def image_rows(self, sample: int) -> list[int]:
        return self.image_numbers[self._images(sample)].tolist()

    def _images(self, sample: int) -> slice:
        return slice(int(self.image_offsets[sample]), int(self.image_offsets[sample + 1]))

    def sample_rows(self, sample: int, name: str) -> tuple[int, int]:
        offsets = self.row_offsets[name]
        return int(offsets[sample]), int(offsets[sample + 1])

    def row_spans(self, sample: int, spec: ArraySpec) -> list[tuple[int, int]]:
        """Where a sample's rows lie, start..stop: one span, or one for each of its images, in order."""
        if spec.owner == "image":
            return [(number, number + 1) for number in self.image_rows(sample)]
        start, stop = self.sample_rows(sample, spec.name)
        return [(start, stop)] if stop > start else []

    def num_rows(self, spec: ArraySpec) -> int:
        """The length that every stored array of `spec` must have."""
        return len(self.digests) if spec.owner == "image" else int(self.row_offsets[spec.name][-1])

    @classmethod
    def of(
        cls,
        entries: Sequence[SampleEntry],
        image_digests: Sequence[str],
        *,
        row_counts: Mapping[str, Sequence[int]],
    ) -> PartIndex:
        number = {digest: i for i, digest in enumerate(image_digests)}
        numbers = [number[digest] for entry in entries for digest in entry.images]
        return cls(
            keys=Texts(entry.key for entry in entries),
            digests=digests(image_digests),
            image_offsets=offsets([len(entry.images) for entry in entries]),
            image_numbers=compact(np.array(numbers, dtype=np.int64)),
            image_spans=Spans.of([span for entry in entries for span in entry.image_spans]),
            json_spans=Spans.of([entry.json_span for entry in entries]),
            row_offsets={name: offsets(counts) for name, counts in row_counts.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "keys": list(self.keys),
            "digests": list(self.digests),
            "images": {
                "offsets": self.image_offsets.tolist(),
                "number": self.image_numbers.tolist(),
                **_span_columns(self.image_spans),
            },
            "json": _span_columns(self.json_spans),
            "rows": {name: offsets.tolist() for name, offsets in self.row_offsets.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PartIndex:
        images = take(record, "images", dict)
        rows = take(record, "rows", dict)
        index = cls(
            keys=Texts(take_all(record, "keys", str)),
            digests=digests(take_all(record, "digests", str)),
            image_offsets=_take_integers(images, "offsets", where="images"),
            image_numbers=_take_integers(images, "number", where="images"),
            image_spans=_spans(images, where="images"),
            json_spans=_spans(take(record, "json", dict), where="json"),
            row_offsets={name: _take_integers(rows, name, where="rows") for name in rows},
        )
        index._check()
        return index

    def _check(self) -> None:
        """Columns of one length, offsets that start at 0 and never fall, numbers that point at an image."""
        _expect_length("json", self.json_spans, len(self.keys))
        _expect_length("images.number", self.image_numbers, len(self.image_spans))
        _expect_offsets(
            "images.offsets", self.image_offsets, samples=len(self.keys), end=len(self.image_spans)
        )
        for name, of_rows in self.row_offsets.items():
            _expect_offsets(f"rows.{name}", of_rows, samples=len(self.keys), end=None)
        if ((self.image_numbers < 0) | (self.image_numbers >= len(self.digests))).any():
            expected = f"numbers below {len(self.digests)}"
            raise SchemaError("images.number", expected=expected, found=self.image_numbers.tolist())


def _take_integers(record: Mapping[str, Any], name: str, *, where: str) -> Integers:
    values: list[int] = take_all(record, name, int, where=where)
    try:
        return compact(np.array(values, dtype=np.int64))
    except OverflowError:
        largest = max(values, key=abs)
        raise SchemaError(f"{where}.{name}", expected="numbers below 2^63", found=largest) from None


def _span_columns(spans: Spans) -> dict[str, list[Any]]:
    return {"file": list(spans.files), "offset": spans.offsets.tolist(), "size": spans.sizes.tolist()}


def _spans(record: Mapping[str, Any], *, where: str) -> Spans:
    files = take_all(record, "file", str, where=where)
    places, sizes = (_take_integers(record, name, where=where) for name in ("offset", "size"))
    for column in (places, sizes):
        _expect_length(where, column, len(files))
    return Spans(files, places, sizes)


def _expect_length(field: str, column: Sized, length: int) -> None:
    if len(column) != length:
        raise SchemaError(field, expected=f"{length} elements", found=f"{len(column)} elements")


def _expect_offsets(field: str, found: Integers, *, samples: int, end: int | None) -> None:
    last = end if end is not None else int(found[-1]) if found.size else -1
    wrong = (
        found.size != samples + 1
        or found[0] != 0
        or found[-1] != last
        or (found[1:] < found[:-1]).any()  # not by differences: unsigned numbers have none below 0
    )
    if wrong:
        expected = f"{samples + 1} offsets rising from 0 to {last}"
        raise SchemaError(field, expected=expected, found=found.tolist())


def read_part_index(part: Place, manifest: Manifest, *, data: bytes | None = None) -> PartIndex:
    """index.json, checked, with row offsets for exactly the sample-owned arrays of the manifest."""
    index = read_part_file(part / INDEX, PartIndex.from_json, data=data)
    names = sorted(spec.name for spec in manifest.arrays if spec.owner == "sample")
    if sorted(index.row_offsets) != names:
        problem = SchemaError("rows", expected=f"offsets of {names}", found=sorted(index.row_offsets))
        raise CorruptPart(part / INDEX, str(problem)) from problem
    return index
