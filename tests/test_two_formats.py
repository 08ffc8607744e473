"""Stores of format 1 beside those of format 2: what is done with both, and what is refused in one sentence."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import golden_store
import pytest
from small_store import entry, manifest, sample_arrays, snapshot, write_store

from cache import (
    ForeignPart,
    FormatMismatch,
    Manifest,
    Store,
    StoreWriter,
    merge_stores,
    push_store,
    restore_manifest,
    slice_store,
    verify,
)

OTHER_FORMAT = (
    "is of format 1, asked for was format 2; parts are added in a store's own format: write to another dir"
)


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(golden_store.folder_of(1) / "store", tmp_path / "old"))


def as_now(path: Path) -> Manifest:
    """The manifest that this version makes for the same arrays."""
    return replace(Store(path).manifest, format_version=2)


def test_stage_1_does_not_continue_a_store_of_format_1(old):
    before = snapshot(old)
    with pytest.raises(FormatMismatch, match=OTHER_FORMAT):
        StoreWriter.open(old, as_now(old))
    assert {name: data for name, data in snapshot(old).items() if name != ".lock"} == before


def test_no_part_is_captured_for_a_manifest_of_format_1(tmp_path):
    writer = StoreWriter.open(tmp_path / "s", manifest("p", format_version=1))
    with pytest.raises(FormatMismatch, match=OTHER_FORMAT):
        writer.part("p", source={})


def test_stores_of_two_formats_are_not_merged(old, tmp_path):
    with pytest.raises(
        FormatMismatch, match="is of format 2, asked for was format 1; merge stores of one format"
    ):
        merge_stores([Store(old), Store(write_store(tmp_path / "new"))], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_store_is_not_pushed_over_one_of_another_format(bucket, old, tmp_path):
    push_store(Store(old), f"{bucket}/first", card=b"")
    with pytest.raises(FormatMismatch, match="is of format 1, asked for was format 2; push to another URL"):
        push_store(Store(write_store(tmp_path / "new")), f"{bucket}/first", card=b"")


def test_a_copy_of_a_store_of_format_1_is_of_format_1_to_the_byte(old, tmp_path):
    made = slice_store(Store(old), tmp_path / "copy", manifest=Store(old).manifest)
    copied = {name: data for name, data in snapshot(made.path).items() if name != ".lock"}
    assert copied == snapshot(old)


def test_a_manifest_that_was_lost_comes_back_in_the_format_of_the_parts(old):
    sound, now = snapshot(old), as_now(old)
    (old / "manifest.json").unlink()
    assert restore_manifest(old, now)
    assert snapshot(old) == sound and verify(old, deep=True).problems == ()


def test_a_part_of_format_1_is_foreign_in_a_store_of_format_2(old, tmp_path):
    writer = StoreWriter.open(tmp_path / "new", as_now(old))
    (old / "parts" / golden_store.PARTS[0]).rename(tmp_path / "new/parts" / golden_store.PARTS[0])
    with pytest.raises(ForeignPart, match="another fingerprint or other arrays"):
        writer.is_done(golden_store.PARTS[0])


def test_arrays_of_fixed_rows_need_no_tokens_and_then_none_are_told(tmp_path):
    specs = tuple(spec for spec in manifest().arrays if spec.owner == "sample")
    with StoreWriter.open(tmp_path / "s", manifest("p", arrays=specs)).part("p", source={}) as part:
        part.add_image("d" * 64, {})
        part.add(entry("k", "d" * 64), sample_arrays(1))
        part.commit()
    [found] = Store(tmp_path / "s").entries("p")
    assert found.tokens == (0,) and found.grids == ((0, 0),)
