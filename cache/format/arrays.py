"""The files of a stored array: one Zarr v3 array, its metadata and one shard, as bytes that are written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportMissingTypeStubs, reportAttributeAccessIssue, reportUnknownVariableType]
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.format.codecs import Array, StoredArray

CHUNK_BYTES = 1 << 15
"""Decompressed. A sample is read by whole chunks, which hold mostly rows of others where rows are small: in larger
chunks these would be more bytes than its vision features. Neighbouring chunks are read as one range, so that small
ones cost little where a sample has many."""

Compression = tuple[Literal["lz4", "zstd"], int]

FAST: Compression = ("lz4", 5)
SMALL: Compression = ("zstd", 2)
WORTH_IT = 0.9
"""Names and levels that blosc is tried with; SMALL is taken where its bytes are at most this share of FAST's, for it
takes twice as long to read. Vision features, whose lower bits are noise, often take less under lz4."""

_SHUFFLES = {"shuffle": 1, "bitshuffle": 2}
# The library tells no types.
_compress = cast(Callable[[Array, bytes, int, int], bytes], blosc.compress)  # pyright: ignore[reportUnknownMemberType]


def array_files(stored: StoredArray, *, rows: Array, axes: list[str]) -> dict[str, memoryview]:
    """All `rows` as the files of a Zarr array, by relative path: a chunk is as many rows as CHUNK_BYTES hold.

    They are made in memory, where zarr holds a shard while it is written anyway: whoever writes them then knows
    their hashes without reading them back.
    """
    num_rows = rows.shape[0]
    chunk_rows = _chunk_rows(stored, num_rows)
    shard_rows = chunk_rows * max(1, -(-num_rows // chunk_rows))
    files: dict[str, Buffer] = {}
    array = zarr.create_array(  # pyright: ignore[reportUnknownMemberType]
        MemoryStore(files),
        shape=rows.shape,
        dtype=stored.dtype,
        chunks=(chunk_rows, *stored.row_shape),
        shards=(shard_rows, *stored.row_shape),
        filters=[],
        compressors=[_compressor(stored, rows[:chunk_rows]), Crc32cCodec()],
        fill_value=stored.fill_value,
        dimension_names=axes,
        # An absent file must mean damage, so a shard of nothing but fill values is written too.
        config={"write_empty_chunks": True},
    )
    if num_rows:
        array[...] = rows
    # Views, for a shard may be gigabytes. numpy's arrays are buffers, though their types do not say so before 3.12.
    return {name: memoryview(cast(bytes, data.as_numpy_array())) for name, data in files.items()}


def _chunk_rows(stored: StoredArray, num_rows: int) -> int:
    row_bytes = np.dtype(stored.dtype).itemsize * int(np.prod(stored.row_shape, dtype=np.int64))
    return max(1, min(CHUNK_BYTES // row_bytes, num_rows))


def _compressor(stored: StoredArray, chunk: Array) -> BloscCodec:
    """FAST or SMALL, by the bytes that this chunk takes under each."""
    itemsize = np.dtype(stored.dtype).itemsize
    fast, small = (
        BloscCodec(typesize=itemsize, cname=name, clevel=level, shuffle=stored.shuffle)
        for name, level in (FAST, SMALL)
    )
    return small if len(_encode(small, chunk)) <= WORTH_IT * len(_encode(fast, chunk)) else fast


def _encode(codec: BloscCodec, chunk: Array) -> bytes:
    shuffle = _SHUFFLES[codec.shuffle.value]
    return _compress(np.ascontiguousarray(chunk), codec.cname.value.encode(), codec.clevel, shuffle)
