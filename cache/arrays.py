"""Stored arrays on the disk: one Zarr v3 array, one shard file each, written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from cache.codecs import Array, StoredArray
from cache.documents import canonical_json
from cache.durable import write_file
from cache.layout import GROUP_METADATA, ZARR_METADATA

CHUNK_BYTES = 1 << 19
"""The flat optimum of reading lies between 256 KB and 1 MB of decompressed bytes."""


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
