"""Reads stored arrays straight from their shard files: each chunk's place is known, so a read is one range.

zarr-python reads the same files and is the tests' independent check. Reading them here costs one range request a
chunk, and every range of a sample can be asked for at once, which is what counts where a request takes milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
from numcodecs import blosc  # pyright: ignore[reportMissingTypeStubs, reportAttributeAccessIssue, reportUnknownVariableType]
from numpy.typing import NDArray

from cache.errors import CorruptPart
from cache.files.durable import hash_bytes
from cache.files.local_files import size_of
from cache.files.place import Place, Range, find_ranges, iter_ranges
from cache.format.codecs import Array, StoredArray
from cache.format.layout import ZARR_METADATA, shard_file
from cache.format.records import FileRecord

MAX_CHUNK_BYTES = 1 << 30  # decompressed; a file that claims more is not of our making
_BLOSC_HEADER_BYTES = 16

# Neither library tells its types.
_crc32c = cast(Callable[[bytes], int], google_crc32c.value)  # pyright: ignore[reportUnknownMemberType]
_decompress = cast(Callable[[memoryview, Array], Array], blosc.decompress)  # pyright: ignore[reportUnknownMemberType]
_CHECKSUM_BYTES = 4
_CHECKED_CRC32C = 0x48674BC7  # of whatever ends with its own crc32c


@dataclass(frozen=True)
class OpenArray:
    """A stored array whose metadata and shard index were found to be what part.json and the manifest say."""

    stored: StoredArray
    shard: Place
    num_rows: int
    chunk_rows: int
    spans: NDArray[np.uint64]  # offset and size of every chunk in the shard

    @property
    def num_chunks(self) -> int:
        return len(self.spans)

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.stored.dtype).newbyteorder("<")

    @cached_property
    def _chunk_bytes(self) -> int:
        return self.chunk_rows * self._dtype.itemsize * math.prod(self.stored.row_shape)

    def range_of(self, number: int) -> Range:
        offset, size = self.spans[number].tolist()
        return Range(self.shard, offset, offset + size)

    def decode_chunk(self, number: int, data: bytes | None) -> Array:
        """The rows of one chunk, not to be written to, from its bytes; None is what an absent file gives."""
        if data is None:
            raise CorruptPart(self.shard, "the file is gone")
        try:
            raw = _decompressed(_checked(data), num_bytes=self._chunk_bytes)
        except ValueError as error:
            raise CorruptPart(self.shard, f"chunk {number} cannot be decoded ({error})") from error
        rows = raw.view(self._dtype).reshape(self.chunk_rows, *self.stored.row_shape)
        return rows[: self.num_rows - number * self.chunk_rows]


def _checked(data: bytes) -> memoryview:
    """Bytes without the crc32c at their end, which must be theirs; not copied."""
    if len(data) <= _CHECKSUM_BYTES or _crc32c(data) != _CHECKED_CRC32C:
        raise ValueError("its crc32c is not that of its bytes")
    return memoryview(data)[:-_CHECKSUM_BYTES]


def _decompressed(content: memoryview, *, num_bytes: int) -> Array:
    """uint8 that blosc compressed, which must say that it is of so many bytes before any memory is taken."""
    if len(content) < _BLOSC_HEADER_BYTES or int.from_bytes(content[4:8], "little") != num_bytes:
        raise ValueError(f"it does not hold the {num_bytes} bytes of a chunk")
    if int.from_bytes(content[12:16], "little") != len(content):
        raise ValueError("its length is not the one in its header")
    raw = np.empty(num_bytes, dtype=np.uint8)
    try:
        _decompress(content, raw)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    raw.flags.writeable = False  # it is kept, and handed out in parts
    return raw


def read_chunks(chunks: Sequence[tuple[OpenArray, int]]) -> Iterator[Array]:
    """Chunks by array and number in turn, all asked for before the first is given."""
    found = iter_ranges([array.range_of(number) for array, number in chunks])
    for (array, number), data in zip(chunks, found, strict=True):
        yield array.decode_chunk(number, data)


def read_chunk(array: OpenArray, number: int) -> Array:
    """One chunk, whatever it holds."""
    return array.decode_chunk(number, find_ranges([array.range_of(number)])[0])


class Wanted(NamedTuple):
    """A stored array to be opened: its name, and the rows that it must have."""

    name: str
    stored: StoredArray
    rows: int


def open_arrays(part: Place, wanted: Sequence[Wanted], *, files: Mapping[str, FileRecord]) -> list[OpenArray]:
    """Open arrays of a part, which must be what the part's record of its files says; two batches of reads."""
    metadata = [part / one.name / ZARR_METADATA for one in wanted]
    documents = find_ranges([Range(file) for file in metadata])
    layouts = [
        _checked_layout(file, document, one, recorded=files.get(f"{one.name}/{ZARR_METADATA}"))
        for file, document, one in zip(metadata, documents, wanted, strict=True)
    ]
    places = [
        _index_range(part, one, chunk_rows=chunk_rows, files=files)
        for one, chunk_rows in zip(wanted, layouts, strict=True)
    ]
    found = iter(find_ranges([index for index in places if index]))
    return [
        _open(index, next(found), one, chunk_rows=chunk_rows)
        if index
        else _without_rows(part, one, chunk_rows)
        for index, one, chunk_rows in zip(places, wanted, layouts, strict=True)
    ]


def _checked_layout(
    file: Place, document: bytes | None, wanted: Wanted, *, recorded: FileRecord | None
) -> int:
    """The rows of a chunk, from an array's zarr.json."""
    if recorded is None or document is None:
        raise CorruptPart(file, "the file is gone")
    if hash_bytes(document) != recorded.blake3:
        raise CorruptPart(file, "its blake3 is not the one in part.json")
    stored, expected = wanted.stored, (wanted.rows, *wanted.stored.row_shape)
    try:
        shape, dtype, chunk_rows = _layout(json.loads(document), stored)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CorruptPart(file, f"it is no array as this format writes it ({error!r})") from error
    if shape != expected or dtype != stored.dtype:
        found = f"it holds {dtype} of shape {shape}"
        raise CorruptPart(file, f"{found}, index and manifest say {stored.dtype} of {expected}")
    return chunk_rows


def _layout(document: Any, stored: StoredArray) -> tuple[tuple[int, ...], str, int]:
    """Shape, dtype and rows of a chunk; ValueError if the array is not laid out as ours are."""
    sharding = document["codecs"][0]
    inner, index = sharding["configuration"]["codecs"], sharding["configuration"]["index_codecs"]
    names = [[codec["name"] for codec in codecs] for codecs in (document["codecs"], inner, index)]
    if names != [["sharding_indexed"], ["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]]:
        raise ValueError(f"codecs {names}")
    if any(
        codecs[0].get("configuration", {}).get("endian", "little") != "little" for codecs in (inner, index)
    ):
        raise ValueError("bytes in big-endian order")
    shape = tuple(document["shape"])
    chunk_rows, *row_shape = sharding["configuration"]["chunk_shape"]
    shard_rows, *_ = document["chunk_grid"]["configuration"]["chunk_shape"]
    row_bytes = np.dtype(stored.dtype).itemsize * int(np.prod(stored.row_shape, dtype=np.float64))
    if type(chunk_rows) is not int or not 1 <= chunk_rows <= max(1, shape[0]):
        raise ValueError(f"chunks of {chunk_rows!r} rows")
    if tuple(row_shape) != stored.row_shape:
        raise ValueError(f"chunks of shape {[chunk_rows, *row_shape]}")
    if (
        shard_rows != chunk_rows * max(1, -(-shape[0] // chunk_rows))
        or chunk_rows * row_bytes > MAX_CHUNK_BYTES
    ):
        raise ValueError(f"shards of {shard_rows} rows, chunks of {chunk_rows}")
    return shape, document["data_type"], chunk_rows


def _index_range(
    part: Place, wanted: Wanted, *, chunk_rows: int, files: Mapping[str, FileRecord]
) -> Range | None:
    """Where the shard's index lies: at its end, 16 bytes a chunk and their checksum; None where there are no rows."""
    if not wanted.rows:
        return None
    name = _shard_name(wanted)
    shard, recorded = part / name, files.get(name)
    size = 16 * -(-wanted.rows // chunk_rows) + _CHECKSUM_BYTES
    if recorded is None:
        raise CorruptPart(shard, "the file is gone")
    found = size_of(shard) if isinstance(shard, Path) else None
    if found not in (None, recorded.bytes):
        raise CorruptPart(shard, f"it has {found} bytes, part.json says {recorded.bytes}")
    if size > recorded.bytes:
        raise CorruptPart(shard, f"its {recorded.bytes} bytes are too few for an index of {size}")
    return Range(shard, recorded.bytes - size, recorded.bytes)


def _shard_name(wanted: Wanted) -> str:
    return shard_file(Path(wanted.name), 1 + len(wanted.stored.row_shape)).as_posix()


def _without_rows(part: Place, wanted: Wanted, chunk_rows: int) -> OpenArray:
    none = np.empty((0, 2), dtype=np.uint64)
    return OpenArray(wanted.stored, part / _shard_name(wanted), 0, chunk_rows, none)


def _open(index: Range, data: bytes | None, wanted: Wanted, *, chunk_rows: int) -> OpenArray:
    """The array whose shard's index is `data`; every chunk must lie before it."""
    if data is None:
        raise CorruptPart(index.file, "the file is gone")
    try:
        spans = np.frombuffer(_checked(data), dtype="<u8").reshape(-1, 2)
    except ValueError as error:
        raise CorruptPart(index.file, f"its index cannot be decoded ({error})") from error
    if len(spans) != -(-wanted.rows // chunk_rows) or any(
        int(offset) + int(size) > index.start for offset, size in spans
    ):
        raise CorruptPart(index.file, "its index points outside the file, or chunks are missing")
    return OpenArray(wanted.stored, index.file, wanted.rows, chunk_rows, spans)
