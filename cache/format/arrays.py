"""Makes the files of a stored array, a Zarr v3 array: its metadata and one shard, as bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, cast

import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportMissingTypeStubs, reportAttributeAccessIssue, reportUnknownVariableType]
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.format.codec import Array, StoredArray

CHUNK_BYTES = 1 << 15
"""Decompressed. A sample is read by whole chunks: larger ones would hold mostly rows of other samples, more bytes
than the sample's vision features. Neighbouring chunks are read as one range, so small ones cost little."""

MOST_RAGGED_BYTES = 1 << 17
CHUNKS_OF_A_BLOCK = 16
"""Where blocks have sizes of their own they begin and end inside chunks, and on average bring one chunk of their
neighbours: a sixteenth of a block. Measured on vision features of 64 to 1,024 tokens (3.7 MB before compression):
chunks of 32 KiB take 1.7 times the CPU of 128 KiB; those of 256 KiB take 8% less CPU, but ask for 5% more bytes."""

Compression = tuple[Literal["lz4", "zstd"], int]

FAST: Compression = ("lz4", 5)
SMALL: Compression = ("zstd", 2)
WORTH_IT = 0.9
"""Names and levels that blosc is tried with. SMALL is taken if its bytes are at most this share of FAST's, because it
takes twice as long to read. Vision features, whose lower bits are noise, are often smaller under lz4."""

_SHUFFLES = {"shuffle": 1, "bitshuffle": 2}
# The library has no types.
_compress = cast(Callable[[Array, bytes, int, int], bytes], blosc.compress)  # pyright: ignore[reportUnknownMemberType]


def array_files(
    stored: StoredArray, *, rows: Array, axes: list[str], chunk_rows: int | None = None
) -> dict[str, memoryview]:
    """Return the files of a Zarr array of `rows`, 'rows *row_shape', by relative path.

    By default a chunk has as many rows as CHUNK_BYTES hold, at least one. zarr holds a whole shard in memory while
    it makes it, so this costs nothing; and the caller can hash the files without reading them back.
    """
    num_rows = rows.shape[0]
    row_bytes = np.dtype(stored.dtype).itemsize * math.prod(stored.row_shape)
    chunk_rows = max(1, min(chunk_rows or CHUNK_BYTES // row_bytes, num_rows))
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
    # Views, because a shard may be gigabytes. Arrays are buffers; their types say so only from Python 3.12 on.
    return {name: memoryview(cast(bytes, data.as_numpy_array())) for name, data in files.items()}


def ragged_chunk(stored: StoredArray, *, row_sizes: Iterable[int], mean_block: float) -> int:
    """Return how many elements a chunk of a flat array holds.

    `row_sizes` are the sizes of its rows, `mean_block` is that of what is read at once. Rows of one size are kept in
    chunks of whole rows, as in an array that is not ragged.
    """
    itemsize, sizes = np.dtype(stored.dtype).itemsize, set(row_sizes)
    if len(sizes) == 1:
        [size] = sizes
        return size * max(1, CHUNK_BYTES // (size * itemsize))
    share = int(mean_block * itemsize) // CHUNKS_OF_A_BLOCK
    return max(CHUNK_BYTES, min(1 << share.bit_length(), MOST_RAGGED_BYTES)) // itemsize


def _compressor(stored: StoredArray, chunk: Array) -> BloscCodec:
    """Return FAST or SMALL, by the bytes that this chunk takes under each."""
    itemsize = np.dtype(stored.dtype).itemsize
    fast, small = (
        BloscCodec(typesize=itemsize, cname=name, clevel=level, shuffle=stored.shuffle)
        for name, level in (FAST, SMALL)
    )
    return small if len(_encode(small, chunk)) <= WORTH_IT * len(_encode(fast, chunk)) else fast


def _encode(codec: BloscCodec, chunk: Array) -> bytes:
    shuffle = _SHUFFLES[codec.shuffle.value]
    return _compress(np.ascontiguousarray(chunk), codec.cname.value.encode(), codec.clevel, shuffle)
