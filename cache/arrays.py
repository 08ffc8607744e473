"""Stored arrays on the disk: one Zarr v3 array, one shard file each, written once and read chunk by chunk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from cache.codecs import Array, StoredArray, holds_fill
from cache.documents import canonical_json
from cache.durable import hash_file, write_file
from cache.errors import CorruptPart
from cache.layout import GROUP_METADATA, ZARR_METADATA, shard_file

CHUNK_BYTES = 1 << 19
"""The flat optimum of reading lies between 256 KB and 1 MB of decompressed bytes."""


@dataclass(frozen=True)
class FileRecord:
    """What part.json says of one file."""

    bytes: int
    blake3: str


def write_group(directory: Path) -> None:
    """Make the directory a Zarr group."""
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / ZARR_METADATA, canonical_json(GROUP_METADATA))


def write_array(path: Path, stored: StoredArray, *, rows: Array, axes: list[str]) -> None:
    """Write all `rows` as one shard; a chunk is as many rows as CHUNK_BYTES hold, at least one."""
    num_rows = rows.shape[0]
    chunk_rows = _chunk_rows(stored, num_rows)
    shard_rows = chunk_rows * max(1, -(-num_rows // chunk_rows))
    array = zarr.create_array(  # pyright: ignore[reportUnknownMemberType]
        str(path),
        shape=rows.shape,
        dtype=stored.dtype,
        chunks=(chunk_rows, *stored.row_shape),
        shards=(shard_rows, *stored.row_shape),
        filters=[],
        compressors=[_blosc(stored), Crc32cCodec()],
        fill_value=stored.fill_value,
        dimension_names=axes,
        # An absent file must mean damage, so a shard of nothing but fill values is written too.
        config={"write_empty_chunks": True},
    )
    if num_rows:
        array[...] = rows


def _chunk_rows(stored: StoredArray, num_rows: int) -> int:
    row_bytes = np.dtype(stored.dtype).itemsize * int(np.prod(stored.row_shape, dtype=np.int64))
    return max(1, min(CHUNK_BYTES // row_bytes, num_rows))


def _blosc(stored: StoredArray) -> BloscCodec:
    itemsize = np.dtype(stored.dtype).itemsize
    return BloscCodec(typesize=itemsize, cname="zstd", clevel=2, shuffle=stored.shuffle)


@dataclass(frozen=True)
class OpenArray:
    """A stored array whose metadata and shard were found to be what part.json says."""

    path: Path
    stored: StoredArray
    array: Any  # zarr.Array, whose indexing is typed too loosely to be of use
    shard: Path

    @property
    def num_rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def chunk_rows(self) -> int:
        return int(self.array.chunks[0])

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def read_chunk(self, number: int) -> Array:
        """The rows of one chunk, none of which is the fill value where the codec never writes that."""
        rows = self.decode_chunk(number)
        if holds_fill(self.stored, rows):
            raise CorruptPart(
                self.shard, f"chunk {number} holds {self.stored.fill_value}, which is never stored"
            )
        return rows

    def decode_chunk(self, number: int) -> Array:
        """The rows of one chunk; zarr would answer a lost shard with fill values, so that is looked for."""
        if not self.shard.exists():
            raise CorruptPart(self.shard, "the file is gone")
        start = number * self.chunk_rows
        try:
            return np.asarray(self.array[start : start + self.chunk_rows])
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptPart(self.shard, f"chunk {number} cannot be decoded ({error})") from error


def open_array(
    part: Path, name: str, stored: StoredArray, *, rows: int, files: Mapping[str, FileRecord]
) -> OpenArray:
    """Open `part/name`, which must hold `rows` rows and be as long as the part's record of its files says."""
    path = part / name
    metadata, shard = path / ZARR_METADATA, shard_file(path, 1 + len(stored.row_shape))
    _check_metadata(metadata, files.get(f"{name}/{ZARR_METADATA}"))
    if rows:
        _check_shard(shard, files.get(shard.relative_to(part).as_posix()))
    try:
        array = zarr.open_array(str(path), mode="r")  # pyright: ignore[reportUnknownMemberType]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CorruptPart(metadata, f"zarr cannot open the array ({error})") from error
    expected, found = (rows, *stored.row_shape), tuple(array.shape)
    if expected != found or str(array.dtype) != stored.dtype:
        detail = f"it holds {array.dtype} of shape {found}"
        raise CorruptPart(metadata, f"{detail}, index and manifest say {stored.dtype} of {expected}")
    return OpenArray(path, stored, array, shard)


def _check_metadata(file: Path, recorded: FileRecord | None) -> None:
    if recorded is None or not file.is_file():
        raise CorruptPart(file, "the file is gone")
    if hash_file(file) != recorded.blake3:
        raise CorruptPart(file, "its blake3 is not the one in part.json")


def _check_shard(file: Path, recorded: FileRecord | None) -> None:
    if recorded is None or not file.is_file():
        raise CorruptPart(file, "the file is gone")
    if file.stat().st_size != recorded.bytes:
        raise CorruptPart(file, f"it has {file.stat().st_size} bytes, part.json says {recorded.bytes}")


class ChunkCache:
    """Decompressed chunks, the least recently used dropped first; one process, one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._chunks: OrderedDict[tuple[Path, int], Array] = OrderedDict()

    def rows(self, array: OpenArray, start: int, stop: int) -> Array:
        """A copy of rows start..stop, start < stop, read through the cache."""
        size = array.chunk_rows
        pieces = [
            self._chunk(array, number)[max(start - number * size, 0) : stop - number * size]
            for number in range(start // size, (stop - 1) // size + 1)
        ]
        return np.concatenate(pieces)

    def _chunk(self, array: OpenArray, number: int) -> Array:
        name = (array.path, number)
        if name in self._chunks:
            self._chunks.move_to_end(name)
            return self._chunks[name]
        chunk = array.read_chunk(number)
        self._chunks[name] = chunk
        self._held_bytes += chunk.nbytes
        while self._held_bytes > self._limit_bytes and self._chunks:
            self._held_bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunk
