"""Stores of each format, as they were once written, are read, checked, cut, merged and sent for good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_store
import numpy as np
import pytest
from servers import static_server

from cache import Mirror, Store, merge_stores, push_store, slice_store, summarise, verify
from cli import main

pytestmark = pytest.mark.slow

VERSIONS = (1, 2)


@pytest.fixture(params=VERSIONS)
def version(request) -> int:
    return request.param


@pytest.fixture
def golden(version) -> Path:
    return golden_store.folder_of(version)


@pytest.fixture
def path(golden) -> Path:
    return golden / "store"


def assert_same(store: Store, golden: Path, *, names: Sequence[str] = (), parts: Sequence[str] = ()) -> None:
    """Compare the arrays of a store with those once read from the golden one: all, or those that are named."""
    expected = np.load(golden / golden_store.EXPECTED_ARRAYS)
    found = golden_store.decoded(store)
    wanted = {
        name
        for name in expected
        if (not names or name.partition("/")[2].split("#")[0] in names)
        and (not parts or any(name.split("/")[0].endswith(part[-1]) for part in parts))
    }
    assert wanted and found.keys() == wanted
    for name in wanted:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_it_says_what_it_said(path, golden):
    expected = json.loads((golden / golden_store.EXPECTED).read_text())
    assert golden_store.facts(Store(path)) == expected


def test_it_gives_the_values_that_it_gave(path, golden):
    assert_same(Store(path), golden)


def test_it_has_no_fault(path):
    report = verify(path, deep=True)
    assert report.problems == () and report.samples == 8


def test_a_slice_of_it_holds_the_same_values(path, golden, tmp_path):
    store, names = Store(path), ("vision/int8", "attention/mean/fixed_point", "labels")
    manifest = replace(store.manifest, arrays=tuple(store.manifest.specs[name] for name in names))
    part = golden_store.PARTS[1:]
    made = slice_store(store, tmp_path / "s", manifest=manifest, parts=part)
    assert made.manifest.format_version == store.manifest.format_version
    assert_same(made, golden, names=names, parts=part)
    assert verify(made.path, deep=True).problems == ()


def test_its_parts_are_merged_into_the_store_that_it_is(path, golden, tmp_path):
    store = Store(path)
    halves = [slice_store(store, tmp_path / p, manifest=store.manifest, parts=[p]) for p in store.parts]
    merged = merge_stores(halves, tmp_path / "merged")
    assert summarise(merged.path).content == summarise(path).content
    assert_same(merged, golden)
    assert verify(merged.path, deep=True).problems == ()


def test_it_is_pushed_and_pulled(bucket, path, golden, tmp_path, version):
    url = f"{bucket}/golden_{version}"
    assert push_store(_writable(path, tmp_path), url, card=b"# a card\n").sent == golden_store.PARTS
    assert_same(Store(url), golden)
    pulled = slice_store(Store(url), tmp_path / "pulled", manifest=Store(url).manifest)
    assert summarise(pulled.path).content == summarise(path).content


def test_a_mirror_gives_the_same_values_again(path, golden, tmp_path):
    mirror = Mirror(tmp_path / "mirror", 10_000_000)
    with static_server(path) as (url, requests):
        assert_same(Store(url, mirror=mirror), golden)
        requests.clear()
        assert_same(Store(url, mirror=mirror), golden)
        assert not any("/c/" in name for name, _ in requests)


def _writable(path: Path, folder: Path) -> Any:
    return Store(shutil.copytree(path, folder / "copy"))


def ended(*arguments: object) -> object:
    """Run a command line and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_store_that_stage_1_did_not_write_is_described_as_far_as_it_says(path, version, bucket, capsys):
    """Its manifest has fewer facts of the teacher, and no targets."""
    assert not ended("info", path)
    assert "teacher     teacher: 4 heads" in capsys.readouterr().out
    assert not ended("push", path, f"s3://lab/golden-{version}")
    assert "2 parts sent" in capsys.readouterr().out


def test_a_store_that_does_not_name_its_targets_is_sliced_by_parts_alone(path, tmp_path, capsys):
    assert ended("slice", path, tmp_path / "cut", "--targets", "vision") == 2
    assert "does not say which array is of which target" in capsys.readouterr().err
    assert not ended("slice", path, tmp_path / "cut", "--fraction", "0.5")
    assert len(Store(tmp_path / "cut").parts) == 1
