"""`python -m bench.reading` at small shapes: ours, and WebDataset, which is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from bench.reading import MODES, OURS, WINDOWS, ask, bytes_table, order, prepared, rates_table, read_all
from bench.reading_worker import as_floats
from bench.synthetic import SIZES, Size
from cache import Store

pytestmark = pytest.mark.slow

SIZE, NUM_SAMPLES, NUM_READ, NUM_REPEATS = SIZES["small"], 48, 16, 2


@pytest.fixture(scope="module", params=["small", "small, mixed"])
def size(request) -> Size:
    return SIZES[request.param]


@pytest.fixture(scope="module")
def folder(size, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reading")


@pytest.fixture(scope="module")
def found(folder, size):
    """The readings of our two contestants and WebDataset."""
    pythons = prepared([], folder, size, NUM_SAMPLES)
    everything = {"samples": str(folder / "samples"), "shard_samples": 8, "indices": list(range(NUM_SAMPLES)),
                  "as_floats": False, "seed": 0, "cache_bytes": None}  # fmt: skip
    ask(sys.executable, "write", "webdataset", folder, **everything)
    checks = [ask(sys.executable, "check", name, folder, **everything) for name in (OURS, "webdataset")]
    assert checks[0] == checks[1] and checks[0][0] == NUM_SAMPLES * 8
    return read_all(pythons | {"webdataset": sys.executable}, folder, size, NUM_SAMPLES, NUM_REPEATS)


def test_every_contestant_is_read_in_every_mode_cold_and_warm(found):
    assert len(found) == 3 * 2 * 2
    for readings in found.values():
        assert len(readings) == NUM_REPEATS
        assert all(reading["samples_a_second"] > 0 and reading["asked"] > 1000 for reading in readings)


def least_bytes_of_vision(size: Size) -> int:
    return 64 * (size.least_grid or size.grid) ** 2 * 2


def test_floats_are_more_bytes_than_their_codes(found, size):
    for name in (OURS, WINDOWS, "webdataset"):
        codes, floats = (found[name, mode, "cold"][0]["delivered"] for mode in MODES)
        assert codes > least_bytes_of_vision(size) and 1.5 * codes < floats < 4 * codes


def test_a_rate_is_a_median_with_its_spread_and_ours_over_ours_is_one(found):
    rows = rates_table(found, "codes", "warm")
    assert [row["codes, warm"] for row in rows] == [OURS, WINDOWS, "webdataset"]
    assert rows[0]["ours over it"] == rows[1]["windows over it"] == "1.00 (1.00..1.00)"


def test_windows_ask_for_fewer_bytes_and_peers_use_more(found, folder):
    rows = bytes_table(found, folder, NUM_SAMPLES)
    used, asked = (
        [float(row[n].replace(",", "")) for row in rows] for n in ("used", "asked for by read calls")
    )
    assert asked[1] < asked[0]  # neighbours share chunks
    assert used[0] == used[1] < used[2]


def test_windows_are_neighbours_of_one_part():
    indices = order(WINDOWS, 48, SIZE, seed=1)
    assert len(set(indices)) == NUM_READ and {index // SIZE.part_samples for index in indices} == {
        indices[0] // 16
    }
    assert len(set(order(OURS, 48, SIZE, seed=1))) == NUM_READ


def test_the_blobs_decode_to_what_the_store_reads(found, folder):
    decoded = as_floats(load_file(folder / "samples" / "000000007.safetensors"))
    store = Store(folder / OURS)
    read = store.read("000000007", list(store.manifest.specs))
    assert read.keys() == decoded.keys()
    for name, array in read.items():
        rows = array[0] if isinstance(array, list) else array  # the block of the one image
        assert rows.dtype == decoded[name].dtype and rows.size == decoded[name].size
        assert (rows == decoded[name]).all()
