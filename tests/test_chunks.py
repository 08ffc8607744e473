"""Our reader of shard files against zarr-python's, and against files that claim what they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cache import CorruptPart
from cache import arrays as written
from cache.chunk_cache import ChunkCache
from cache.chunks import OpenArray, Wanted, open_arrays, read_chunk
from cache.codec import StoredArray
from cache.part_writer import describe_files

DTYPES = ("uint8", "int16", "float16", "float32", "int32", "int64")


def write(folder: Path, dtype: str, *, rows: int, row_shape: tuple[int, ...]) -> tuple[OpenArray, Any]:
    """An array in chunks of a few rows, opened by us and by zarr."""
    stored = StoredArray("", dtype, row_shape, "bitshuffle", 0, False)
    values = np.random.default_rng(rows).integers(0, 100, size=(rows, *row_shape)).astype(dtype)
    written.write_array(folder / "a", stored, rows=values, axes=["R", "H", "N"][: 1 + len(row_shape)])
    [opened] = open_arrays(folder, [Wanted("a", stored, rows)], files=describe_files(folder))
    return opened, zarr.open_array(str(folder / "a"), mode="r")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(written, "CHUNK_BYTES", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_shape", [(), (3,), (2, 5)])
def test_every_chunk_is_what_zarr_reads(tmp_path, small_chunks, dtype, row_shape):
    ours, theirs = write(tmp_path, dtype, rows=150, row_shape=row_shape)
    assert ours.num_chunks > 1 and ours.chunk_rows == theirs.chunks[0]
    chunks = np.concatenate([read_chunk(ours, number) for number in range(ours.num_chunks)])
    assert chunks.dtype == theirs.dtype and np.array_equal(chunks, theirs[...])


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> tuple[OpenArray, np.ndarray]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "CHUNK_BYTES", 64)
        ours, theirs = write(tmp_path_factory.mktemp("spread"), "int16", rows=40, row_shape=(5,))
    return ours, np.asarray(theirs[...])


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 40)), max_size=4), st.integers(0, 500))
def test_any_spans_are_joined_in_their_order_whatever_the_cache_holds(spread, drawn, limit_bytes):
    ours, theirs = spread
    spans = [(start, min(start + length, 40)) for start, length in drawn]
    cache = ChunkCache(limit_bytes)
    for _ in range(2):
        [rows] = cache.rows([(ours, spans)])
        expected = [theirs[:0], *(theirs[start:stop] for start, stop in spans)]
        assert np.array_equal(rows, np.concatenate(expected))


def test_an_array_without_rows_has_no_shard_and_reads_as_none(tmp_path):
    ours, theirs = write(tmp_path, "float32", rows=0, row_shape=(3,))
    assert ours.num_chunks == theirs.shape[0] == 0
    [rows] = ChunkCache(100).rows([(ours, [])])
    assert rows.shape == (0, 3)


def test_a_chunk_that_claims_another_size_is_refused_before_memory_is_taken(tmp_path, small_chunks):
    ours, _ = write(tmp_path, "uint8", rows=23, row_shape=(3,))
    shard = Path(str(ours.shard))
    data, (offset, size) = bytearray(shard.read_bytes()), ours.spans[0]
    data[offset + 4 : offset + 8] = (2**31 - 1).to_bytes(4, "little")
    content = bytes(data[offset : offset + size - 4])
    data[offset + size - 4 : offset + size] = google_crc32c.value(content).to_bytes(4, "little")
    shard.write_bytes(data)
    with pytest.raises(
        CorruptPart, match=r"chunk 0 cannot be decoded .*does not hold the 63 bytes of a chunk"
    ):
        read_chunk(ours, 0)
