"""index.json: the samples of a part as columns, so that keys, images and row counts need no array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptPart, SchemaError
from cache.layout import INDEX
from cache.place import Place
from cache.records import read_part_file
from cache.schema import ArraySpec, Manifest, SampleEntry, Span, take, take_all

Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class PartIndex:
    """index.json: columns over the samples of a part, in the order in which their rows are stored."""

    keys: tuple[str, ...]
    digests: tuple[str, ...]  # distinct images; row i of every image-owned array belongs to digests[i]
    image_offsets: Offsets  # CSR over samples into the three columns below
    image_numbers: tuple[int, ...]  # into digests
    image_spans: tuple[Span, ...]
    json_spans: tuple[Span, ...]
    row_offsets: dict[str, Offsets]  # CSR over samples into the rows of every sample-owned array

    def entry(self, sample: int) -> SampleEntry:
        span = slice(self.image_offsets[sample], self.image_offsets[sample + 1])
        images = tuple(self.digests[number] for number in self.image_numbers[span])
        return SampleEntry(self.keys[sample], images, self.image_spans[span], self.json_spans[sample])

    def image_rows(self, sample: int) -> tuple[int, ...]:
        return self.image_numbers[self.image_offsets[sample] : self.image_offsets[sample + 1]]

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
        digests: Sequence[str],
        *,
        row_counts: Mapping[str, Sequence[int]],
    ) -> PartIndex:
        number = {digest: i for i, digest in enumerate(digests)}
        return cls(
            keys=tuple(entry.key for entry in entries),
            digests=tuple(digests),
            image_offsets=_offsets([len(entry.images) for entry in entries]),
            image_numbers=tuple(number[digest] for entry in entries for digest in entry.images),
            image_spans=tuple(span for entry in entries for span in entry.image_spans),
            json_spans=tuple(entry.json_span for entry in entries),
            row_offsets={name: _offsets(counts) for name, counts in row_counts.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "keys": list(self.keys),
            "digests": list(self.digests),
            "images": {
                "offsets": self.image_offsets.tolist(),
                "number": list(self.image_numbers),
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
            keys=tuple(take_all(record, "keys", str)),
            digests=tuple(take_all(record, "digests", str)),
            image_offsets=_take_offsets(images, "offsets", where="images"),
            image_numbers=tuple(take_all(images, "number", int, where="images")),
            image_spans=_spans(images, where="images"),
            json_spans=_spans(take(record, "json", dict), where="json"),
            row_offsets={name: _take_offsets(rows, name, where="rows") for name in rows},
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
        for name, offsets in self.row_offsets.items():
            _expect_offsets(f"rows.{name}", offsets, samples=len(self.keys), end=None)
        if any(not 0 <= number < len(self.digests) for number in self.image_numbers):
            raise SchemaError(
                "images.number", expected=f"numbers below {len(self.digests)}", found=self.image_numbers
            )


def _take_offsets(record: Mapping[str, Any], name: str, *, where: str) -> Offsets:
    values: list[int] = take_all(record, name, int, where=where)
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        largest = max(values, key=abs)
        raise SchemaError(f"{where}.{name}", expected="numbers below 2^63", found=largest) from None


def _offsets(counts: Sequence[int]) -> Offsets:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _span_columns(spans: Sequence[Span]) -> dict[str, list[Any]]:
    return {name: [getattr(span, name) for span in spans] for name in ("file", "offset", "size")}


def _spans(record: Mapping[str, Any], *, where: str) -> tuple[Span, ...]:
    kinds = {"file": str, "offset": int, "size": int}
    columns = [take_all(record, name, kind, where=where) for name, kind in kinds.items()]
    for column in columns[1:]:
        _expect_length(where, column, len(columns[0]))
    return tuple(Span(*row) for row in zip(*columns, strict=True))


def _expect_length(field: str, column: Sequence[Any], length: int) -> None:
    if len(column) != length:
        raise SchemaError(field, expected=f"{length} elements", found=f"{len(column)} elements")


def _expect_offsets(field: str, offsets: Offsets, *, samples: int, end: int | None) -> None:
    last = end if end is not None else int(offsets[-1]) if offsets.size else -1
    wrong = (
        offsets.size != samples + 1 or offsets[0] != 0 or offsets[-1] != last or (np.diff(offsets) < 0).any()
    )
    if wrong:
        expected = f"{samples + 1} offsets rising from 0 to {last}"
        raise SchemaError(field, expected=expected, found=offsets.tolist())


def read_part_index(part: Place, manifest: Manifest, *, data: bytes | None = None) -> PartIndex:
    """index.json, checked, with row offsets for exactly the sample-owned arrays of the manifest."""
    index = read_part_file(part / INDEX, PartIndex.from_json, data=data)
    names = sorted(spec.name for spec in manifest.arrays if spec.owner == "sample")
    if sorted(index.row_offsets) != names:
        problem = SchemaError("rows", expected=f"offsets of {names}", found=sorted(index.row_offsets))
        raise CorruptPart(part / INDEX, str(problem)) from problem
    return index
