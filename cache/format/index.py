"""index.json: the samples of a part as columns, so that keys, images and row counts need no array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from cache.errors import CorruptPart, SchemaError
from cache.files.any_path import AnyPath
from cache.format.columns import Digests, Integers, Numbers, Spans, Strings, Texts, digests, integers, offsets
from cache.format.documents import validated
from cache.format.layout import INDEX
from cache.format.records import read_part_file
from cache.format.schema import ArraySpec, Manifest, SampleEntry

_MOST_TOKENS = 1 << 31  # of an image; more means a corrupt file, and products of two still fit 64 bits


@dataclass(eq=False)
class Images(Spans):
    """The spans of the images of all samples, one sample after another."""

    offsets: Numbers  # CSR: sample s has the images offsets[s] .. offsets[s + 1]
    number: Numbers  # into PartIndex.digests


@dataclass(eq=False)
class Grids:
    """How the vision tokens of distinct images lie: 0 x 0 where they form no single rectangle."""

    rows: Numbers
    columns: Numbers

    def pair(self, image: int) -> tuple[int, int]:
        return int(self.rows[image]), int(self.columns[image])


@dataclass(frozen=True, eq=False)
class PartIndex:
    """Columns over the samples of a part, in the order in which their rows are stored; the fields of index.json."""

    keys: Strings
    digests: Digests  # names of distinct images; row i of every image-owned array belongs to digests[i]
    images: Images
    json: Spans  # of the samples' JSON members
    rows: dict[str, Numbers]  # CSR offsets into the rows of every sample-owned array
    tokens: Numbers | None = None  # vision tokens of the distinct images; None in format 1
    grid: Grids | None = None  # of the distinct images; None in format 1

    def entry(self, sample: int) -> SampleEntry:
        numbers = self.image_rows(sample)
        return SampleEntry(
            self.keys[sample],
            tuple(self.digests[number] for number in numbers),
            self.images[self._images(sample)],
            self.json[sample],
            self.tokens_of(sample),
            tuple(self.grid.pair(number) for number in numbers) if self.grid else (),
        )

    def tokens_of(self, sample: int) -> tuple[int, ...]:
        """Return how many vision tokens each image of a sample has; nothing in format 1."""
        return () if self.tokens is None else tuple(self.tokens[self.image_rows(sample)].tolist())

    def image_rows(self, sample: int) -> list[int]:
        return self.images.number[self._images(sample)].tolist()

    def _images(self, sample: int) -> slice:
        return slice(*self.images.offsets[sample : sample + 2].tolist())

    def row_spans(self, sample: int, spec: ArraySpec) -> list[tuple[int, int]]:
        """Return where a sample's rows lie, start..stop: one span, or one for each of its images, in order."""
        if spec.owner == "image":
            return [(number, number + 1) for number in self.image_rows(sample)]
        start, stop = self.rows[spec.name][sample : sample + 2].tolist()
        return [(start, stop)] if stop > start else []

    def num_rows(self, spec: ArraySpec) -> int:
        """Return how many rows `spec` has over all samples or distinct images."""
        return len(self.digests) if spec.owner == "image" else int(self.rows[spec.name][-1])

    @classmethod
    def of(
        cls,
        entries: Sequence[SampleEntry],
        image_digests: Sequence[str],
        *,
        row_counts: Mapping[str, Sequence[int]],
        tokens: Sequence[int],
        grids: Sequence[tuple[int, int]],
    ) -> PartIndex:
        """Return the index of format 2; `tokens` and `grids` are of the distinct images."""
        numbers = {digest: number for number, digest in enumerate(image_digests)}
        spans = Spans.of([span for entry in entries for span in entry.image_spans])
        starts = offsets([len(entry.images) for entry in entries])
        number = integers([numbers[digest] for entry in entries for digest in entry.images])
        return cls(
            keys=Texts(entry.key for entry in entries),
            digests=digests(image_digests),
            images=Images(**vars(spans), offsets=starts, number=number),
            json=Spans.of([entry.json_span for entry in entries]),
            rows={name: offsets(counts) for name, counts in row_counts.items()},
            tokens=integers(tokens),
            grid=Grids(integers([rows for rows, _ in grids]), integers([columns for _, columns in grids])),
        )

    def to_json(self) -> dict[str, Any]:
        return TypeAdapter(PartIndex).dump_python(self, exclude_none=True)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PartIndex:
        index = validated(cls, record)
        index._check()
        return index

    def _check(self) -> None:
        """Check that columns are of one length, offsets start at 0 and never fall, and numbers are of images."""
        images, num_samples, num_images = self.images, len(self.keys), len(self.images)
        for name, spans, length in (("images", images, num_images), ("json", self.json, num_samples)):
            for column in (spans.file, spans.offset, spans.size):
                _expect_length(name, column, length)
        _expect_length("images.number", images.number, num_images)
        _expect_offsets("images.offsets", images.offsets, samples=num_samples, end=num_images)
        for name, of_rows in self.rows.items():
            _expect_offsets(f"rows.{name}", of_rows, samples=num_samples, end=None)
        if ((images.number < 0) | (images.number >= len(self.digests))).any():
            expected = f"numbers below {len(self.digests)}"
            raise SchemaError("images.number", expected=expected, found=images.number.tolist())
        if self.tokens is not None and self.grid is not None:
            _expect_grids(self.tokens, self.grid, images=len(self.digests))


def _expect_grids(tokens: Integers, grid: Grids, *, images: int) -> None:
    columns = {"tokens": tokens, "grid.rows": grid.rows, "grid.columns": grid.columns}
    for name, column in columns.items():
        _expect_length(name, column, images)
        if ((column < 0) | (column >= _MOST_TOKENS)).any():
            raise SchemaError(name, expected=f"numbers from 0 to {_MOST_TOKENS - 1}", found=column.tolist())
    rows, widths = grid.rows.astype(np.int64), grid.columns.astype(np.int64)
    if wrong := np.flatnonzero(((rows != 0) | (widths != 0)) & (rows * widths != tokens)).tolist():
        found = f"{rows[wrong[0]]} x {widths[wrong[0]]}"
        expected = f"0 x 0 or a rectangle of {tokens[wrong[0]]} tokens for image {wrong[0]}"
        raise SchemaError("grid", expected=expected, found=found)


def _expect_length(field: str, column: Sized, length: int) -> None:
    if len(column) != length:
        raise SchemaError(field, expected=f"{length} elements", found=f"{len(column)} elements")


def _expect_offsets(field: str, found: Integers, *, samples: int, end: int | None) -> None:
    last = end if end is not None else int(found[-1]) if found.size else -1
    wrong = (
        found.size != samples + 1
        or found[0] != 0
        or found[-1] != last
        or (
            found[1:] < found[:-1]
        ).any()  # not by np.diff: unsigned differences wrap around instead of below 0
    )
    if wrong:
        expected = f"{samples + 1} offsets rising from 0 to {last}"
        raise SchemaError(field, expected=expected, found=found.tolist())


def read_part_index(part: AnyPath, manifest: Manifest, *, data: bytes | None = None) -> PartIndex:
    """Return a part's index.json; `data` are its bytes, if they are known already.

    Raises `CorruptPart` if it is damaged or does not have row offsets of exactly the manifest's sample-owned arrays.
    """
    index = read_part_file(part / INDEX, PartIndex.from_json, data=data)
    found, expected = [index.tokens is not None, index.grid is not None], manifest.format_version > 1
    if found != [expected, expected]:
        wanted = f"{'both' if expected else 'neither'} in a store of format {manifest.format_version}"
        problem = SchemaError("tokens and grid", expected=wanted, found=found)
        raise CorruptPart(part / INDEX, str(problem)) from problem
    names = sorted(spec.name for spec in manifest.arrays if spec.owner == "sample")
    if sorted(index.rows) != names:
        problem = SchemaError("rows", expected=f"offsets of {names}", found=sorted(index.rows))
        raise CorruptPart(part / INDEX, str(problem)) from problem
    return index
