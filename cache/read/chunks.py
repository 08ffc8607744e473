"""Reads chunks of stored arrays straight from their shard files, each by one range.

zarr-python reads the same files and is the tests' independent check. It would ask for one range after another; here
all ranges of a batch are requested at once, which is what counts where a request takes milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
from numcodecs import blosc  # pyright: ignore[reportMissingTypeStubs, reportAttributeAccessIssue, reportUnknownVariableType]
from numpy.typing import NDArray

from cache.errors import CorruptPart
from cache.files.any_path import AnyPath, Range, find_ranges, iter_ranges
from cache.files.local_files import size_of
from cache.format.codec import Array, StoredArray
from cache.format.layout import ZARR_METADATA
from cache.format.records import FileRecord, checked_bytes

MAX_CHUNK_BYTES = 1 << 30  # decompressed; a larger value means a corrupt or foreign file
_BLOSC_HEADER_BYTES = 16
_CHECKSUM_BYTES = 4
_CHECKED_CRC32C = 0x48674BC7  # the crc32c of any bytes that end with their own crc32c, little-endian
_FOREIGN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

# Neither library has types.
_crc32c = cast(Callable[[bytes], int], google_crc32c.value)  # pyright: ignore[reportUnknownMemberType]
_decompress = cast(Callable[[memoryview, Array], Array], blosc.decompress)  # pyright: ignore[reportUnknownMemberType]


class Wanted(NamedTuple):
    """A stored array to be opened: its name, and the rows that it must have."""

    name: str
    stored: StoredArray
    rows: int


@dataclass(frozen=True)
class OpenArray:
    """A stored array whose metadata and shard index match part.json and the manifest."""

    stored: StoredArray
    shard: AnyPath
    num_rows: int
    chunk_rows: int
    spans: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))
    """Offset and size of every chunk in the shard."""

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def range_of(self, number: int) -> Range:
        offset, size = self.spans[number].tolist()
        return Range(self.shard, offset, offset + size)

    def decode_chunk(self, number: int, data: bytes | None) -> Array:
        """Return the rows of one chunk from its bytes, not to be written to; None means that the file is absent."""
        if data is None:
            raise CorruptPart(self.shard, "the file is gone")
        dtype = np.dtype(self.stored.dtype).newbyteorder("<")
        num_bytes = self.chunk_rows * dtype.itemsize * math.prod(self.stored.row_shape)
        try:
            raw = _decompressed(_checked(data), num_bytes=num_bytes)
        except ValueError as error:
            raise CorruptPart(self.shard, f"chunk {number} cannot be decoded ({error})") from error
        rows = raw.view(dtype).reshape(self.chunk_rows, *self.stored.row_shape)
        return rows[
            : self.num_rows - number * self.chunk_rows
        ]  # the last chunk is filled up with fill values


def _checked(data: bytes) -> memoryview:
    """Return the bytes without the crc32c at their end, not copied. Raises `ValueError` if it is not theirs."""
    if len(data) <= _CHECKSUM_BYTES or _crc32c(data) != _CHECKED_CRC32C:
        raise ValueError("its crc32c is not that of its bytes")
    return memoryview(data)[:-_CHECKSUM_BYTES]


def _decompressed(content: memoryview, *, num_bytes: int) -> Array:
    """Return the uint8 that blosc compressed. Its header must say `num_bytes` before any memory is allocated.

    The header (https://www.blosc.org/pages/blosc-in-depth): 4 bytes of versions and flags, then three little-endian
    uint32, the decompressed size, the block size and the compressed size.
    """
    if len(content) < _BLOSC_HEADER_BYTES or int.from_bytes(content[4:8], "little") != num_bytes:
        raise ValueError(f"it does not hold the {num_bytes} bytes of a chunk")
    if int.from_bytes(content[12:16], "little") != len(content):
        raise ValueError("its length is not the one in its header")
    raw = np.empty(num_bytes, dtype=np.uint8)
    try:
        _decompress(content, raw)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    raw.flags.writeable = False  # chunks are kept, and views of them handed out
    return raw


def read_chunks(chunks: Sequence[tuple[OpenArray, int]]) -> Iterator[Array]:
    """Yield chunks, given by array and number; all are requested before the first is given."""
    found = iter_ranges([array.range_of(number) for array, number in chunks])
    for (array, number), data in zip(chunks, found, strict=True):
        yield array.decode_chunk(number, data)


def open_arrays(
    part: AnyPath, wanted: Sequence[Wanted], *, files: Mapping[str, FileRecord]
) -> list[OpenArray]:
    """Open arrays of a part by two batches of reads, first of all metadata, then of all shard indexes.

    Raises `CorruptPart` where they do not match `files`, which is what part.json says, or the manifest.
    """
    documents = find_ranges([Range(part / one.name / ZARR_METADATA) for one in wanted])
    arrays = [_described(part, *both, files=files) for both in zip(wanted, documents, strict=True)]
    # An array without rows has no shard.
    indexes = {n: _index_range(part, wanted[n].name, a, files) for n, a in enumerate(arrays) if a.num_rows}
    for (number, index), data in zip(indexes.items(), find_ranges(list(indexes.values())), strict=True):
        arrays[number] = replace(arrays[number], spans=_spans(index, data, arrays[number].num_chunks))
    return arrays


def _described(
    part: AnyPath, wanted: Wanted, document: bytes | None, *, files: Mapping[str, FileRecord]
) -> OpenArray:
    """Return an array as its zarr.json describes it, still without the spans of its chunks."""
    stored, name = wanted.stored, f"{wanted.name}/{ZARR_METADATA}"
    file, expected = part / name, (wanted.rows, *wanted.stored.row_shape)
    data = checked_bytes(file, document, files.get(name))
    try:
        shape, dtype, chunk_rows = _layout(json.loads(data), stored)
    except _FOREIGN as error:
        raise CorruptPart(file, f"it is no array as this format writes it ({error!r})") from error
    if shape != expected or dtype != stored.dtype:
        found = f"it holds {dtype} of shape {shape}"
        raise CorruptPart(file, f"{found}, index and manifest say {stored.dtype} of {expected}")
    return OpenArray(stored, part / _shard_name(wanted.name, stored), wanted.rows, chunk_rows)


def _layout(document: Any, stored: StoredArray) -> tuple[tuple[int, ...], str, int]:
    """Return shape, dtype and rows of a chunk. Raises one of _FOREIGN if `array_files` would lay it out otherwise."""
    sharding = document["codecs"][0]["configuration"]
    inner, index = sharding["codecs"], sharding["index_codecs"]
    names = [[codec["name"] for codec in codecs] for codecs in (document["codecs"], inner, index)]
    if names != [["sharding_indexed"], ["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]]:
        raise ValueError(f"codecs {names}")
    if any(
        codec.get("configuration", {}).get("endian", "little") != "little" for codec in (inner[0], index[0])
    ):
        raise ValueError("bytes in big-endian order")
    shape = tuple(document["shape"])
    chunk_rows, *row_shape = sharding["chunk_shape"]
    shard_rows, *_ = document["chunk_grid"]["configuration"]["chunk_shape"]
    if type(chunk_rows) is not int or not 1 <= chunk_rows <= max(1, shape[0]):
        raise ValueError(f"chunks of {chunk_rows!r} rows")
    if tuple(row_shape) != stored.row_shape:
        raise ValueError(f"chunks of shape {[chunk_rows, *row_shape]}")
    chunk_bytes = chunk_rows * np.dtype(stored.dtype).itemsize * math.prod(stored.row_shape)
    if shard_rows != chunk_rows * max(1, -(-shape[0] // chunk_rows)) or chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"shards of {shard_rows} rows, chunks of {chunk_rows}")
    return shape, document["data_type"], chunk_rows


def _shard_name(array: str, stored: StoredArray) -> str:
    """Return the one shard file of an array: chunk (0, 0, ...) under zarr's default key encoding."""
    return "/".join([array, "c", *["0"] * (1 + len(stored.row_shape))])


def _index_range(part: AnyPath, name: str, array: OpenArray, files: Mapping[str, FileRecord]) -> Range:
    """Return where the shard's index lies: at its end, two uint64 (offset, size) a chunk and then their crc32c."""
    recorded = files.get(_shard_name(name, array.stored))
    size = 16 * array.num_chunks + _CHECKSUM_BYTES
    if recorded is None:
        raise CorruptPart(array.shard, "the file is gone")
    found = size_of(array.shard) if isinstance(array.shard, Path) else None
    if found not in (None, recorded.bytes):
        raise CorruptPart(array.shard, f"it has {found} bytes, part.json says {recorded.bytes}")
    if size > recorded.bytes:
        raise CorruptPart(array.shard, f"its {recorded.bytes} bytes are too few for an index of {size}")
    return Range(array.shard, recorded.bytes - size, recorded.bytes)


def _spans(index: Range, data: bytes | None, num_chunks: int) -> NDArray[np.uint64]:
    """Return offset and size of every chunk from the bytes of a shard's index; all must lie before the index."""
    if data is None:
        raise CorruptPart(index.file, "the file is gone")
    try:
        spans = np.frombuffer(_checked(data), dtype="<u8").reshape(-1, 2)
    except ValueError as error:
        raise CorruptPart(index.file, f"its index cannot be decoded ({error})") from error
    # Added as Python's integers: an absent chunk is 2^64 - 1 twice, whose sum as uint64 wraps around.
    if len(spans) != num_chunks or any(offset + size > index.start for offset, size in spans.tolist()):
        raise CorruptPart(index.file, "its index points outside the file, or chunks are missing")
    return spans
