"""Ragged arrays: rows as long as their image has vision tokens come back as they were handed over, or are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ragged_store import (  # fmt: skip
    ARRAYS,
    CROP,
    PART,
    SAMPLES,
    TOKENS,
    A,
    B,
    arrays_of,
    image_arrays,
    sample_arrays,
    write_ragged_store,
)
from small_store import entry, manifest

from cache import (
    ArrayMismatch,
    ArraySpec,
    MisusedWriter,
    RefusedValue,
    SchemaError,
    Store,
    StoreWriter,
    summarise,
    verify,
)
from cache.format.arrays import CHUNK_BYTES, MOST_RAGGED_BYTES
from cache.format.blocks import decode_blocks, encode_blocks
from cache.format.codecs import CODECS

SPECS = {spec.name: spec for spec in ARRAYS}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_ragged_store(tmp_path_factory.mktemp("ragged") / "s")


def assert_blocks(spec: ArraySpec, found: list[Any], written: list[Any]) -> None:
    """Each block has its image's shape, and values within the error that the codec states."""
    assert type(found) is list and len(found) == len(written)
    for block, values in zip(found, written, strict=True):
        assert block.shape == values.shape and block.dtype == np.float32
        bound = CODECS[spec.codec].max_error(values, spec.options)
        assert (np.abs(block.astype(np.float64) - values) <= bound).all()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_every_image_has_a_block_of_its_own_tokens(sound, cache_bytes):
    store = Store(sound, cache_bytes=cache_bytes)
    keys = [prefix + name for name in SAMPLES for prefix in "ba"]
    for key, read in zip(keys, store.read_many(keys, list(SPECS)), strict=True):
        images, written = SAMPLES[key[1]][0], arrays_of(*key)
        for name in ("attention/layer_0", "attention/layer_1", "map"):
            assert_blocks(SPECS[name], read[name], written[name])
        for name in ("vision", "vision_int8"):
            assert_blocks(SPECS[name], read[name], [image_arrays(image)[name][0] for image in images])
        assert read["pooled"].shape == (len(images), 3) and (read["input_ids"] == written["input_ids"]).all()


def test_an_entry_tells_the_tokens_and_grids_of_its_images(sound):
    store = Store(sound)
    [_, three, none, *_] = store.entries(PART)
    assert three.images == (B, A, CROP)
    assert three.tokens == (4, 6, 5) and three.grids == ((2, 2), (2, 3), (0, 0))
    assert none.tokens == none.grids == ()


def test_nothing_is_wrong_with_it_and_its_rows_are_counted(sound):
    assert verify(sound, deep=True).problems == ()
    rows = {array.name: array.rows for array in summarise(sound).arrays}
    assert rows["attention/layer_0"] == 2 * (5 + 3 * 3 + 2 * 2) and rows["vision"] == 2 * 3


def test_zarr_reads_the_codes_as_one_axis_of_elements(sound):
    array: Any = zarr.open_array(str(sound / "parts" / PART / "vision"), mode="r")
    assert array.shape == (4 * (6 + 4 + 5),) and array.metadata.dimension_names == ("I D N",)
    images = dict.fromkeys(image for images, _ in SAMPLES.values() for image in images)
    expected = np.concatenate([image_arrays(image)["vision"].ravel() for image in images])
    assert np.abs(array[...] * 2.0**-7 - expected).max() <= 2.0**-8


# Rows of one size


@pytest.mark.parametrize("codec", ["sqrt_uint8", "fixed_point", "float16", "int8"])
@pytest.mark.parametrize(
    ("owner", "axes", "leading"), [("sample", "R H N", (3,)), ("image", "I D N", (700,))]
)
def test_images_of_one_size_take_the_bytes_of_an_array_that_is_not_ragged(
    codec, owner, axes, leading, tmp_path
):
    options = {"step": 2.0**-12} if codec == "fixed_point" else {}
    for name, last in (("fixed", 24), ("ragged", None)):
        _write_equal(tmp_path / name, ArraySpec("it", axes, (*leading, last), owner, codec, options))
    shards = {name: tmp_path / name / "parts/p/it/c" for name in ("fixed", "ragged")}
    assert (shards["fixed"] / "0/0/0").read_bytes() == (shards["ragged"] / "0").read_bytes()
    fixed, ragged = (Store(tmp_path / name).read("k3", ["it"])["it"] for name in shards)
    assert (np.concatenate(ragged).reshape(fixed.shape) == fixed).all() and fixed.shape[0] > 1


def _write_equal(path: Path, spec: ArraySpec) -> None:
    """Samples of two images of 24 tokens, more rows than one chunk holds."""
    chance = np.random.default_rng(0)
    with StoreWriter.open(path, manifest("p", arrays=(spec,))).part("p", source={}) as part:
        for number in range(60):
            names = [f"{number}{place}".ljust(64, "e") for place in range(2)]
            for name in names:
                values = chance.random((1, *spec.shape_of(24)), dtype=np.float32) * 7
                part.add_image(name, {"it": values} if spec.owner == "image" else {}, tokens=24, grid=(4, 6))
            blocks = [chance.random((7, *spec.shape_of(24)), dtype=np.float32) * 7 for _ in names]
            rows = blocks if spec.is_ragged else np.concatenate(blocks)
            part.add(entry(f"k{number}", *names), {"it": rows} if spec.owner == "sample" else {})
        part.commit()


# Any sizes

OPTIONS: dict[str, dict[str, Any]] = {"fixed_point": {"step": 0.5}}
CODED = st.sampled_from([name for name, codec in CODECS.items() if codec.takes == "float"])


@given(
    st.lists(st.integers(1, 9), max_size=4), st.integers(0, 3), st.lists(st.integers(1, 3), max_size=2), CODED
)
def test_blocks_of_any_sizes_come_back_within_the_stated_error(tokens, rows, leading, codec):
    options, axes = OPTIONS.get(codec, {}), " ".join("RHDN"[: 2 + len(leading)])
    spec = ArraySpec("it", axes, (*leading, None), "sample", codec, options)
    chance = np.random.default_rng(0)
    blocks = [chance.random((rows, *leading, count), dtype=np.float32) * 100 for count in tokens]
    stored = encode_blocks(spec, blocks, tokens)
    assert stored[""].shape == (sum(block.size for block in blocks),)
    assert_blocks(spec, decode_blocks(spec, stored, [block.shape for block in blocks]), blocks)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 40)), min_size=1, max_size=5)
)
def test_samples_that_span_chunks_come_back_whatever_their_images(tmp_path_factory, drawn):
    """Images of 100 to 9,000 bytes a row, so that rows, blocks and samples begin and end inside chunks."""
    sizes, path = (25, 300, 1000, 2250), tmp_path_factory.mktemp("spans") / "s"
    specs = (ArraySpec("map", "R H N", (3, None), "sample", "float32", {}),
             ArraySpec("vision", "I D N", (40, None), "image", "float32", {}))  # fmt: skip
    chance, names = np.random.default_rng(0), [str(size).ljust(64, "e") for size in sizes]
    vision = [chance.random((1, 40, size), dtype=np.float32) for size in sizes]
    maps = [[chance.random((rows, 3, sizes[i]), dtype=np.float32) for i in images] for images, rows in drawn]
    with StoreWriter.open(path, manifest("p", arrays=specs)).part("p", source={}) as part:
        for name, size, values in zip(names, sizes, vision, strict=True):
            part.add_image(name, {"vision": values}, tokens=size)
        for key, ((images, _), blocks) in enumerate(zip(drawn, maps, strict=True)):
            part.add(entry(str(key), *(names[i] for i in images)), {"map": blocks})
        part.commit()
    store = Store(path, cache_bytes=100_000)
    for key, ((images, _), blocks) in enumerate(zip(drawn, maps, strict=True)):
        read = store.read(str(key), ["vision", "map"])
        for name, expected in (("map", blocks), ("vision", [vision[i][0] for i in images])):
            assert len(read[name]) == len(expected)
            assert all(
                np.array_equal(found, values) for found, values in zip(read[name], expected, strict=True)
            )


@pytest.mark.parametrize(("channels", "expected"), [(8, CHUNK_BYTES), (2000, MOST_RAGGED_BYTES)])
def test_large_blocks_of_different_sizes_lie_in_larger_chunks(tmp_path, channels, expected):
    spec = ArraySpec("vision", "I D N", (channels, None), "image", "float16", {})
    names = [str(size).ljust(64, "e") for size in range(300, 1500, 100)]
    with StoreWriter.open(tmp_path / "s", manifest("p", arrays=(spec,))).part("p", source={}) as part:
        for place, name in enumerate(names):
            tokens = 300 + 100 * place
            part.add_image(name, {"vision": np.ones((1, channels, tokens), np.float32)}, tokens=tokens)
            part.add(entry(name, name), {})
        part.commit()
    array: Any = zarr.open_array(str(tmp_path / "s/parts/p/vision"), mode="r")
    assert array.chunks[0] * 2 == expected


# What is refused


def added(tmp_path: Path, arrays: dict[str, Any], images: tuple[str, ...] = (A, B)) -> Callable[[], None]:
    writer = StoreWriter.open(tmp_path / "s", manifest(PART, arrays=ARRAYS))

    def add() -> None:
        with writer.part(PART, source={}) as part:
            for image in TOKENS:
                part.add_image(image, image_arrays(image), tokens=TOKENS[image])
            part.add(entry("k", *images), arrays)

    return add


def test_blocks_that_are_not_those_of_the_images_are_refused(tmp_path):
    right = sample_arrays(0, [6, 4], 3)
    name, other = "attention/layer_0", sample_arrays(0, [4, 6], 3)
    uneven = [right[name][0], right[name][1][:2]]
    for blocks, expected in (
        (other[name], "expected shape (rows, (2, 6)), found shape (3, 2, 4)"),
        (right[name][:1], "expected 2 blocks, one for each image, found 1 blocks"),
        (uneven, "expected as many rows for each image, found blocks of 3, 2 rows"),
        (right[name][0], "expected a list with a block for each image, found one array of shape (3, 2, 6)"),
    ):
        with pytest.raises(ArrayMismatch, match=re.escape(f"Array '{name}': {expected}; hand over")):
            added(tmp_path, right | {name: blocks})()
    with pytest.raises(ArrayMismatch, match=r"Array 'input_ids': expected one array, found a list of 2"):
        added(tmp_path, right | {"input_ids": [1, 2]})()
    with pytest.raises(RefusedValue, match=r"Array 'map': 1 of 12 values are not finite"):
        right["map"][1][0, 0] = np.nan
        added(tmp_path, right)()


@pytest.mark.parametrize(
    ("tokens", "grid", "expected"),
    [
        (0, (0, 0), "with 0 vision tokens, but array 'attention/layer_0' needs at least one; hand over their number"),
        (-1, (0, 0), "with -1 vision tokens, but"),
        (6, (2, 2), "with 6 vision tokens in a grid of 2 x 2; hand over a grid of so many, or (0, 0)"),
        (6, (-2, -3), "in a grid of -2 x -3"),
        (6, (0, 6), "in a grid of 0 x 6"),
    ],
)  # fmt: skip
def test_tokens_and_grids_that_cannot_be_are_refused(tmp_path, tokens, grid, expected):
    writer = StoreWriter.open(tmp_path / "s", manifest(PART, arrays=ARRAYS))
    with writer.part(PART, source={}) as part, pytest.raises(MisusedWriter, match=re.escape(expected)):
        part.add_image(A, image_arrays(A), tokens=tokens, grid=grid)


def test_an_image_of_other_tokens_than_its_arrays_is_refused(tmp_path):
    writer = StoreWriter.open(tmp_path / "s", manifest(PART, arrays=ARRAYS))
    with writer.part(PART, source={}) as part:
        with pytest.raises(
            ArrayMismatch, match=r"Array 'vision': expected shape \(rows, \(4, 7\)\), found shape \(1, 4"
        ):
            part.add_image(A, image_arrays(A), tokens=7)
        with pytest.raises(
            ArrayMismatch, match="Array 'vision': expected one row for one image, found 2 rows"
        ):
            part.add_image(A, image_arrays(A) | {"vision": np.zeros((2, 4, 6), np.float32)}, tokens=6)
        assert not part.has_image(A)


def test_a_format_1_manifest_holds_no_ragged_array():
    with pytest.raises(
        SchemaError, match=r"arrays: expected fixed row shapes in format 1, found \['attention/layer_0'"
    ):
        replace(manifest(arrays=ARRAYS), format_version=1)
