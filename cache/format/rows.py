"""Where the rows of a part's samples and images lie in its stored arrays: all of it follows from the index."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptPart, SchemaError
from cache.files.any_path import AnyPath
from cache.format.codec import StoredArray
from cache.format.columns import Integers, compact
from cache.format.index import PartIndex, read_part_index
from cache.format.layout import INDEX
from cache.format.schema import ArraySpec, Manifest

_MOST_ELEMENTS = 2.0**53  # floats count so far without an error
Span = tuple[int, int]  # start..stop


class PartRows:
    """The rows of every sample and image of a part, and their elements in the flat arrays of ragged ones.

    An image's block has `math.prod(leading)` x its vision tokens elements a row. An image-owned array has a block of
    one row for each distinct image. A sample-owned array has a block for each image of each sample, in order, of as
    many rows for each image of the sample.
    """

    def __init__(self, index: PartIndex, specs: Iterable[ArraySpec]) -> None:
        """Raises `SchemaError` if a sample has rows that are not as many for each of its images."""
        self.index = index
        # In units of one row of one token: of image or sample o, starts[o] .. starts[o + 1].
        self._starts = {spec.name: _starts(index, spec) for spec in specs if spec.is_ragged}

    def length(self, spec: ArraySpec, stored: StoredArray) -> int:
        """Return the length that a stored array of `spec` must have."""
        if stored.is_flat:
            return _elements(spec) * int(self._starts[spec.name][-1])
        return self.index.num_rows(spec)

    def spans(self, sample: int, spec: ArraySpec, stored: StoredArray) -> list[Span]:
        """Return where a sample's rows or elements lie: one span, or one for each of its images, in order."""
        spans = self.index.row_spans(sample, spec)
        if not stored.is_flat:
            return spans
        owners = spans if spec.owner == "image" else [(sample, sample + 1)]
        starts, size = self._starts[spec.name], _elements(spec)
        found = [(size * int(starts[owner]), size * int(starts[stop])) for owner, stop in owners]
        return [(start, stop) for start, stop in found if stop > start]

    def block_shapes(self, sample: int, spec: ArraySpec) -> list[tuple[int, ...]]:
        """Return the shapes 'rows *leading tokens' of the blocks of a sample's images, in order."""
        tokens = self.index.tokens_of(sample)
        rows = 1
        if spec.owner == "sample":
            rows = sum(stop - start for start, stop in self.index.row_spans(sample, spec)) // max(
                1, len(tokens)
            )
        return [(rows, *spec.shape_of(count)) for count in tokens]

    def owner_at(self, spec: ArraySpec, stored: StoredArray, place: int) -> str:
        """Return the image or sample that a row, or an element of a flat array, belongs to."""
        if stored.is_flat:
            starts, place = self._starts[spec.name], place // _elements(spec)
        elif spec.owner == "image":
            return f"image {self.index.digests[place]}"
        else:
            starts = self.index.rows[spec.name]
        owner = int(np.searchsorted(starts, place, side="right")) - 1
        return (
            f"image {self.index.digests[owner]}"
            if spec.owner == "image"
            else f"sample {self.index.keys[owner]!r}"
        )


def read_part_rows(part: AnyPath, manifest: Manifest, *, data: bytes | None = None) -> PartRows:
    """Return the rows of a part by its index.json; `data` are the file's bytes, if they are known already.

    Raises `CorruptPart` if the index is damaged, or is not one of a store with this manifest.
    """
    index = read_part_index(part, manifest, data=data)
    try:
        return PartRows(index, manifest.arrays)
    except SchemaError as error:
        raise CorruptPart(part / INDEX, str(error)) from error


def _elements(spec: ArraySpec) -> int:
    """Return the elements of a row for each vision token."""
    return math.prod(spec.leading)


def _starts(index: PartIndex, spec: ArraySpec) -> Integers:
    """Return where the tokens of each image, or of all rows of each sample, start among those of the part."""
    tokens = _expect_tokens(index)
    if spec.owner == "image":
        return _summed(tokens.astype(np.float64), spec)
    images = index.images.offsets.astype(np.int64)
    of_images = np.concatenate([[0], np.cumsum(tokens[index.images.number])])
    rows_each = _rows_of_an_image(index, spec, np.diff(images))
    tokens_of_samples = of_images[images[1:]] - of_images[images[:-1]]
    return _summed(rows_each * tokens_of_samples.astype(np.float64), spec)


def _expect_tokens(index: PartIndex) -> NDArray[np.int64]:
    tokens = index.tokens
    if tokens is None or (tokens < 1).any():
        found = None if tokens is None else tokens.tolist()
        raise SchemaError("tokens", expected="at least one vision token for each image", found=found)
    return tokens.astype(np.int64)


def _rows_of_an_image(index: PartIndex, spec: ArraySpec, num_images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many rows each image of each sample has."""
    rows = np.diff(index.rows[spec.name].astype(np.int64))
    each = rows // np.maximum(num_images, 1)
    if (wrong := np.flatnonzero(each * num_images != rows)).size:
        sample = int(wrong[0])
        raise SchemaError(
            f"rows.{spec.name}",
            expected=f"as many rows for each of the {num_images[sample]} images of sample {sample}",
            found=int(rows[sample]),
        )
    return each


def _summed(counts: NDArray[np.float64], spec: ArraySpec) -> Integers:
    """Return the sums of the counts before each owner. Floats, because corrupt counts may be beyond 64 bits."""
    if float(counts.sum()) * _elements(spec) > _MOST_ELEMENTS:
        raise SchemaError(f"rows.{spec.name}", expected="fewer than 2^53 elements", found=float(counts.sum()))
    return compact(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
