"""index.json: the samples of a part as columns, so that keys, images and row counts need no array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from cache.errors import CorruptPart, SchemaError
from cache.files.any_path import AnyPath
from cache.format.columns import Digests, Integers, Numbers, Spans, Strings, Texts, digests, integers, offsets
from cache.format.documents import validated
from cache.format.layout import INDEX
from cache.format.records import read_part_file
from cache.format.schema import ArraySpec, Manifest, SampleEntry


@dataclass(eq=False)
class Images(Spans):
    """The spans of the images of all samples, one sample after another."""

    offsets: Numbers  # CSR: sample s has the images offsets[s] .. offsets[s + 1]
    number: Numbers  # into PartIndex.digests


@dataclass(frozen=True, eq=False)
class PartIndex:
    """Columns over the samples of a part, in the order in which their rows are stored; the fields of index.json."""

    keys: Strings
    digests: Digests  # distinct images; row i of every image-owned array belongs to digests[i]
    images: Images
    json: Spans  # of the samples' JSON members
    rows: dict[str, Numbers]  # CSR offsets into the rows of every sample-owned array

    def entry(self, sample: int) -> SampleEntry:
        images = tuple(self.digests[number] for number in self.image_rows(sample))
        return SampleEntry(self.keys[sample], images, self.images[self._images(sample)], self.json[sample])

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
        """Return the length that every stored array of `spec` must have."""
        return len(self.digests) if spec.owner == "image" else int(self.rows[spec.name][-1])

    @classmethod
    def of(
        cls,
        entries: Sequence[SampleEntry],
        image_digests: Sequence[str],
        *,
        row_counts: Mapping[str, Sequence[int]],
    ) -> PartIndex:
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
        )

    def to_json(self) -> dict[str, Any]:
        return TypeAdapter(PartIndex).dump_python(self)

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
    names = sorted(spec.name for spec in manifest.arrays if spec.owner == "sample")
    if sorted(index.rows) != names:
        problem = SchemaError("rows", expected=f"offsets of {names}", found=sorted(index.rows))
        raise CorruptPart(part / INDEX, str(problem)) from problem
    return index
