"""A store gives back what was written, by key, from any process, and raises where it cannot."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from small_store import (
    DIGEST_A,
    DIGEST_B,
    entry,
    entry_read,
    flip_bit,
    image_arrays,
    manifest,
    sample_arrays,
    write_clashing_store,
    write_store,
)

from cache import (
    CorruptFile,
    CorruptPart,
    DuplicateKey,
    ForeignPart,
    KeyNotInStore,
    Store,
    StoreNotFound,
    StoreWriter,
    UnknownArray,
    UnknownPart,
    UnsupportedFormat,
)
from cache.format.documents import document_bytes, read_document

PART = "shard-000000"
SHARD = f"parts/{PART}/hidden/c/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(write_store(tmp_path_factory.mktemp("reader") / "teacher.zarr"))


def test_the_samples_are_listed_in_stored_order(store: Store) -> None:
    assert store.parts == (PART, "shard-000001") and store.missing_parts == ()
    assert list(store.keys()) == ["a0", "a1", "a2", "b0", "b1", "b2"] and len(store) == 6
    assert "b1" in store and "a3" not in store
    assert store.entries(PART) == [
        entry_read("a0", DIGEST_A),
        entry_read("a1", DIGEST_B, DIGEST_A),
        entry_read("a2"),
    ]
    assert store.locate("b1") == ("shard-000001", entry_read("b1", DIGEST_B, DIGEST_A))
    assert store.rejects(PART) == [("a3", "not an image")]
    assert store.manifest == manifest()


def test_a_sample_comes_back_as_it_was_written(store: Store) -> None:
    written = sample_arrays(11, num_rows=3)
    read = store.read("b1", list(written))
    for name in ("logits/ids", "hidden", "input_ids"):
        assert (read[name] == written[name]).all()
    assert read["logits/ids"].dtype == np.uint16 and read["input_ids"].dtype == np.int32
    assert np.abs(read["attention/layer_0"] - written["attention/layer_0"]).max() < 0.004
    assert read["attention/layer_0"].dtype == np.float32


def test_images_are_stacked_in_the_order_of_the_sample(store: Store) -> None:
    expected = np.concatenate([image_arrays(2)["vision"], image_arrays(1)["vision"]])
    vision = store.read("a1", ["vision"])["vision"]
    assert vision.shape == (2, 4, 6) and np.abs(vision - expected).max() <= 2.0**-8


def test_nothing_to_read_has_the_right_shape(store: Store) -> None:
    read = store.read("a2", ["vision", "logits/ids", "logits/values"])
    assert [array.shape for array in read.values()] == [(0, 4, 6), (0, 3), (0, 3)]
    assert [array.dtype for array in read.values()] == [np.float32, np.uint16, np.float32]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 16, 1 << 28])
def test_any_order_and_any_cache_size_read_the_same(tmp_path: Path, cache_bytes: int) -> None:
    """Rows of 64 KB, eight to a chunk, so that samples span chunks."""
    spec = next(spec for spec in manifest().arrays if spec.name == "hidden")
    wide = type(spec)("hidden", "R D", (1 << 14,), "sample", "float32", {})
    writer = StoreWriter.open(tmp_path / "s", manifest("p", arrays=(wide,)))
    random = np.random.default_rng(0)
    rows = [random.normal(size=(count, 1 << 14)).astype(np.float32) for count in (3, 9, 0, 1, 20)]
    with writer.part("p", source={}) as part:
        for number, array in enumerate(rows):
            part.add(entry(str(number)), {"hidden": array})
        part.commit()
    store = Store(tmp_path / "s", cache_bytes=cache_bytes)
    for number in random.integers(0, len(rows), size=30):
        assert (store.read(str(number), ["hidden"])["hidden"] == rows[number]).all()
        assert store._chunks._chunks.currsize <= cache_bytes
        assert store._chunks._chunks.currsize == sum(chunk.nbytes for chunk in store._chunks._chunks.values())


@pytest.mark.slow
@given(
    keys=st.lists(st.sampled_from(["a0", "a1", "b0", "b1"]), max_size=6),
    cache_bytes=st.sampled_from([0, 1 << 20]),
)
def test_many_at_once_are_each_what_reading_it_alone_gives(
    store: Store, keys: list[str], cache_bytes: int
) -> None:
    names = list(store.manifest.specs)
    found = list(Store(store.path, cache_bytes=cache_bytes).read_many(keys, names))
    assert len(found) == len(keys)
    for key, arrays in zip(keys, found, strict=True):
        alone = store.read(key, names)
        assert list(arrays) == names and all(np.array_equal(arrays[name], alone[name]) for name in names)


def test_of_many_at_once_the_one_that_is_damaged_is_named_after_those_before_it(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    flip_bit(path / SHARD, offset=0)
    found = Store(path).read_many(["b0", "b1", "a0"], ["hidden"])
    assert (next(found)["hidden"] == sample_arrays(10)["hidden"]).all()
    next(found)
    with pytest.raises(CorruptPart, match="reading sample 'a0'"):
        next(found)


def test_what_is_read_is_the_readers_own(store: Store) -> None:
    before = store.read("a0", ["input_ids"])["input_ids"]
    store.read("a0", ["input_ids"])["input_ids"][:] = -1
    assert (store.read("a0", ["input_ids"])["input_ids"] == before).all()


def test_a_pickled_store_reads_the_same_and_carries_nothing_open(store: Store) -> None:
    store.read("a0", ["hidden"])
    data = pickle.dumps(store)
    assert len(data) < 4096
    copy = pickle.loads(data)
    assert (copy.read("a1", ["hidden"])["hidden"] == store.read("a1", ["hidden"])["hidden"]).all()
    assert copy.parts == store.parts


def _sum(store: Store, key: str) -> float:
    return float(store.read(key, ["hidden"])["hidden"].sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_store_used_before_workers_start_is_read_by_them(store: Store, method: str) -> None:
    expected = [_sum(store, key) for key in ("a0", "b1")]
    with multiprocessing.get_context(method).Pool(1) as pool:
        results = [pool.apply_async(_sum, (store, key)) for key in ("a0", "b1")]
        assert [result.get(timeout=60) for result in results] == expected


def test_plain_zarr_opens_the_hierarchy(store: Store) -> None:
    root: Any = zarr.open_group(str(store.path), mode="r")
    array = root[f"parts/{PART}/attention/layer_0"]
    assert array.metadata.dimension_names == ("R", "H", "N")
    assert {name for name, _ in root["parts"].members()} == {PART, "shard-000001"}
    assert {name for name, _ in root[f"parts/{PART}/logits"].members()} == {"ids", "values"}
    codes, scale = array[:5], root[f"parts/{PART}/attention/layer_0_scale"][:5]
    decoded = scale.astype(np.float32)[..., None] * (codes.astype(np.float32) / 255) ** 2
    assert np.allclose(decoded, store.read("a0", ["attention/layer_0"])["attention/layer_0"])


def test_chunks_are_checked_by_core_codecs_only(store: Store) -> None:
    array: Any = zarr.open_array(str(store.path / f"parts/{PART}/vision"), mode="r")
    codecs = array.metadata.to_dict()["codecs"]
    assert [codec["name"] for codec in codecs] == ["sharding_indexed"]
    inner = codecs[0]["configuration"]
    assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]


def test_where_there_is_no_store_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, found in [
        (tmp_path / "none", "nothing"),
        (tmp_path / "file", "a file"),
        (tmp_path, "a directory without one"),
    ]:
        with pytest.raises(StoreNotFound) as caught:
            Store(path)
        assert (
            f"No teacher store at {path}: asked for a directory with a manifest.json, found {found}; "
            in str(caught.value)
        )
        assert "alignkd teacher-cache" in str(caught.value)


def test_names_the_store_does_not_have_are_answered_with_those_it_has(store: Store) -> None:
    with pytest.raises(
        UnknownArray, match="has no array 'visions'; it has attention/layer_0, hidden, input_ids"
    ):
        store.read("a0", ["visions"])
    with pytest.raises(UnknownPart, match="has no finished part 'x' among its 2; see `alignkd info`"):
        store.entries("x")
    with pytest.raises(
        KeyNotInStore, match=r"Sample key 'a3' is not among the 6 samples .*\(0 planned parts are not"
    ):
        store.locate("a3")


def test_a_key_in_two_parts_is_refused_naming_both(tmp_path: Path) -> None:
    with pytest.raises(
        DuplicateKey, match="Sample key 'k' appears in parts 'one' and 'two'; give every sample"
    ):
        Store(write_clashing_store(tmp_path)).check_keys()


def test_a_part_without_its_done_mark_is_not_there(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    (path / "parts" / PART / "part.json").unlink()
    assert Store(path).parts == ("shard-000001",) and Store(path).missing_parts == (PART,)


def damaged(path: Path, *, key: str = "a0") -> str:
    with pytest.raises(CorruptPart) as caught:
        Store(path).read(key, ["hidden"])
    assert "run `alignkd verify --deep`" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("offset", [0, 40, -1, -10])
def test_a_flipped_bit_in_a_shard_raises_with_file_and_key(tmp_path: Path, offset: int) -> None:
    path = write_store(tmp_path / "s")
    flip_bit(path / SHARD, offset=offset)
    text = damaged(path)
    place = "chunk 0" if offset >= 0 else "its index"
    assert f"{path / SHARD} is damaged (reading sample 'a0'): {place} cannot be decoded" in text
    assert (Store(path).read("b0", ["hidden"])["hidden"] == sample_arrays(10)["hidden"]).all()


def test_a_deleted_shard_raises_instead_of_reading_as_fill_values(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    opened = Store(path, cache_bytes=0)
    opened.read("a0", ["hidden"])
    (path / SHARD).unlink()
    assert f"{path / SHARD} is damaged (reading sample 'a0'): the file is gone" in damaged(path)
    with pytest.raises(CorruptPart, match="the file is gone"):
        opened.read("a1", ["hidden"])


def test_a_truncated_shard_and_changed_metadata_raise(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-5])
    assert "bytes, part.json says" in damaged(path)
    metadata = path / f"parts/{PART}/hidden/zarr.json"
    metadata.write_text(metadata.read_text().replace('"NaN"', "0.0"))
    assert f"{metadata} is damaged" in damaged(path) and "its blake3 is not the one" in damaged(path)
    metadata.unlink()
    assert f"{metadata} is damaged" in damaged(path) and "the file is gone" in damaged(path)


@pytest.mark.parametrize("name", ["part.json", "index.json", "rejects.jsonl"])
def test_a_flipped_bit_in_a_parts_records_raises_with_the_file(tmp_path: Path, name: str) -> None:
    path = write_store(tmp_path / "s")
    flip_bit(path / "parts" / PART / name, offset=20)
    with pytest.raises(CorruptPart, match=f"{name} is damaged"):
        store = Store(path)
        store.rejects(PART)
        store.check_keys()


def test_an_index_with_a_number_beyond_64_bits_is_told(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    file = path / "parts" / PART / "index.json"
    content = read_document(file)
    content["rows"]["hidden"][1] = 2**63
    file.write_bytes(document_bytes(content))
    assert "index.json is damaged" in damaged(
        path
    ) and "rows.hidden[1]: expected less than 9223372036854775808" in damaged(path)


def test_a_part_of_another_store_or_name_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    swapped = {PART: "shard-000001", "shard-000001": PART}
    for name in swapped:
        (path / "parts" / name).rename(path / name)
    for name, other in swapped.items():
        (path / name).rename(path / "parts" / other)
    with pytest.raises(CorruptPart, match=f"it is the record of part '{PART}'"):
        Store(path).read("a0", ["hidden"])
    content = read_document(path / "manifest.json")
    content["fingerprint"]["teacher"] = "other"
    (path / "manifest.json").write_bytes(document_bytes(content))
    for name, other in swapped.items():
        (path / "parts" / other).rename(path / name)
    for name in swapped:
        (path / name).rename(path / "parts" / name)
    with pytest.raises(ForeignPart, match="written for a store of another fingerprint or other arrays"):
        Store(path).read("b0", ["hidden"])


def test_a_damaged_or_newer_manifest_is_told(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    content = read_document(path / "manifest.json")
    flip_bit(path / "manifest.json", offset=9)
    with pytest.raises(
        CorruptFile, match=r"manifest\.json is damaged: .*; run `alignkd verify` on the store"
    ):
        Store(path)
    (path / "manifest.json").write_bytes(document_bytes(content | {"format_version": 7}))
    with pytest.raises(UnsupportedFormat, match="of store format 7, this version reads formats 1 and 2"):
        Store(path)


def test_a_part_of_a_newer_format_is_told(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    file = path / "parts" / PART / "part.json"
    file.write_bytes(document_bytes(read_document(file) | {"format_version": 7}))
    with pytest.raises(UnsupportedFormat, match=r"part\.json is of store format 7"):
        Store(path).read("a0", ["hidden"])
