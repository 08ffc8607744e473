"""Our reader of shard files against zarr-python's, and against files that claim what they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from servers import static_server
from small_store import describe_files, write_array

from cache import CorruptPart
from cache.files.any_path import Range, any_path, find_ranges
from cache.format.codec import StoredArray
from cache.read.chunk_cache import ChunkCache
from cache.read.chunks import OpenArray, Wanted, open_arrays, read_chunks

DTYPES = ("uint8", "int16", "float16", "float32", "int32", "int64")


def write(folder: Path, dtype: str, *, rows: int, row_shape: tuple[int, ...]) -> tuple[OpenArray, Any]:
    """An array in chunks of a few rows, opened by us and by zarr."""
    stored = StoredArray("", dtype, row_shape, "bitshuffle", 0, False)
    values = np.random.default_rng(rows).integers(0, 100, size=(rows, *row_shape)).astype(dtype)
    write_array(folder / "a", stored, rows=values, axes=["R", "H", "N"][: 1 + len(row_shape)])
    [opened] = open_arrays(folder, [Wanted("a", stored, rows)], files=describe_files(folder))
    return opened, zarr.open_array(str(folder / "a"), mode="r")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "row_shape"), [(40_000, ()), (15_000, (3,)), (50, (30, 50))])
def test_every_chunk_is_what_zarr_reads(tmp_path, dtype, rows, row_shape):
    ours, theirs = write(tmp_path, dtype, rows=rows, row_shape=row_shape)
    assert ours.num_chunks > 1 and ours.chunk_rows == theirs.chunks[0]
    chunks = np.concatenate(list(read_chunks([(ours, number) for number in range(ours.num_chunks)])))
    assert chunks.dtype == theirs.dtype and np.array_equal(chunks, theirs[...])


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> tuple[OpenArray, np.ndarray]:
    ours, theirs = write(tmp_path_factory.mktemp("spread"), "int16", rows=40, row_shape=(2500,))
    assert ours.chunk_rows == 6
    return ours, np.asarray(theirs[...])


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(1, 40)), max_size=4), st.integers(0, 250_000))
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


def test_a_chunk_that_claims_another_size_is_refused_before_memory_is_taken(tmp_path):
    ours, _ = write(tmp_path, "uint8", rows=23, row_shape=(3000,))
    shard = Path(str(ours.shard))
    data, (offset, size) = bytearray(shard.read_bytes()), ours.spans[0]
    data[offset + 4 : offset + 8] = (2**31 - 1).to_bytes(4, "little")
    content = bytes(data[offset : offset + size - 4])
    data[offset + size - 4 : offset + size] = google_crc32c.value(content).to_bytes(4, "little")
    shard.write_bytes(data)
    with pytest.raises(
        CorruptPart, match=r"chunk 0 cannot be decoded .*does not hold the 30000 bytes of a chunk"
    ):
        next(read_chunks([(ours, 0)]))


@pytest.mark.parametrize(
    ("rows", "name"),
    [(np.random.default_rng(0).normal(0, 50, size=(1, 4096, 144)), "lz4"), (np.ones((1, 4096, 144)), "zstd")],
    ids=["noise", "one value"],
)
def test_an_array_is_compressed_fast_unless_the_small_way_saves_a_tenth_of_its_first_chunk(
    tmp_path, rows, name
):
    stored = StoredArray("", "int16", (4096, 144), "bitshuffle", -32768, True)
    write_array(tmp_path / "a", stored, rows=rows.astype(np.int16), axes=["I", "D", "N"])
    codecs = json.loads((tmp_path / "a" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert [codec["configuration"]["cname"] for codec in codecs if codec["name"] == "blosc"] == [name]
    [opened] = open_arrays(tmp_path, [Wanted("a", stored, 1)], files=describe_files(tmp_path))
    assert np.array_equal(next(read_chunks([(opened, 0)])), rows.astype(np.int16))


def test_rows_of_one_chunk_are_not_copied_and_cannot_be_written_to(spread):
    ours, theirs = spread
    cache = ChunkCache(1 << 20)
    [first], [again] = (cache.rows([(ours, [(1, 4)])]) for _ in range(2))
    assert np.shares_memory(first, again) and np.array_equal(first, theirs[1:4])
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_a_chunk_is_kept_only_if_it_has_rows_of_others_or_is_asked_for_twice(spread):
    ours, theirs = spread
    size = ours.chunk_rows
    for spans, kept in (
        ([(0, size)], []),
        ([(0, size + 1)], [1]),
        ([(1, 2 * size)], [0]),
        ([(0, size), (0, size)], [0]),
    ):
        cache = ChunkCache(1 << 20)
        [rows] = cache.rows([(ours, spans)])
        assert np.array_equal(rows, np.concatenate([theirs[start:stop] for start, stop in spans]))
        assert [number for _, number in cache._chunks] == kept


def test_readings_that_overlap_count_what_they_keep_once(spread):
    ours, theirs = spread
    cache = ChunkCache(1 << 20)
    first, second = (cache.rows([(ours, [(1, 3)]), (ours, [(2, 4)])]) for _ in range(2))
    for rows in (next(first), next(second)):
        assert np.array_equal(rows, theirs[1:3])
    assert len(list(first)) == len(list(second)) == 1
    assert cache._chunks.currsize == sum(chunk.nbytes for chunk in cache._chunks.values()) > 0


def test_neighbouring_ranges_are_one_request_and_come_back_apart(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    with static_server(tmp_path) as (url, requests):
        for folder in (tmp_path, any_path(url)):
            f, absent = folder / "f", folder / "g"
            ranges = [
                Range(f, 0, 9),
                Range(f, 9, 12),
                Range(absent, 0, 4),
                Range(absent, 4, 6),
                Range(f, 50, 60),
            ]
            ranges += [Range(f, 60), Range(f, 5, 9)]
            expected = [bytes(range(*span)) for span in ((0, 9), (9, 12), (50, 60), (60, 100), (5, 9))]
            assert find_ranges(ranges) == [*expected[:2], None, None, *expected[2:]]
        assert sorted(name for name, _ in requests) == ["/f", "/f", "/f", "/g"]
