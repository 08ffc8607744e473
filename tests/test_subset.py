"""slice, merge, gc: stores of stores are sound, read the same, and refuse what does not belong together."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_experiment import stored_arrays
from small_store import FINGERPRINT, fill_part, flip_bit, manifest, snapshot, write_store

import cli
from cache import (
    CorruptPart,
    FingerprintMismatch,
    PartConflict,
    Store,
    StoreWriter,
    UnknownArray,
    UnknownPart,
    merge_stores,
    slice_store,
    summarise,
    verify,
)
from pipeline.distill.student import train_student
from pipeline.teacher_cache.teacher import cache_teacher


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("subset") / "whole")


def only(store: Path, *names: str):
    stored = Store(store).manifest
    return replace(stored, arrays=tuple(spec for spec in stored.arrays if spec.name in names))


def test_a_slice_of_everything_is_the_store(whole, tmp_path):
    made = slice_store(Store(whole), tmp_path / "s", manifest=Store(whole).manifest)
    assert (
        summarise(made.path).content == summarise(whole).content
        and verify(made.path, deep=True).problems == ()
    )


def test_a_slice_has_the_arrays_and_parts_asked_for_with_the_same_values(whole, tmp_path):
    names = ("vision", "logits/ids", "input_ids")
    made = slice_store(Store(whole), tmp_path / "s", manifest=only(whole, *names), parts=["shard-000001"])
    assert verify(made.path, deep=True).problems == () and made.parts == ("shard-000001",)
    assert set(made.manifest.specs) == set(names) and list(made.keys()) == ["b0", "b1", "b2"]
    for key in made.keys():  # noqa: SIM118
        ours, theirs = made.read(key, names), Store(whole).read(key, names)
        assert all(np.array_equal(ours[name], theirs[name]) for name in names)
    assert made.rejects("shard-000001") == [("b3", "not an image")]
    assert not (made.path / "parts" / "shard-000001" / "hidden").exists()


def test_a_slice_goes_on_where_it_stopped(whole, tmp_path):
    slice_store(Store(whole), tmp_path / "s", manifest=Store(whole).manifest, parts=["shard-000000"])
    before = {file.name: file.stat().st_ino for file in (tmp_path / "s/parts/shard-000000").iterdir()}
    told: list[tuple[int, int]] = []
    manifest = Store(whole).manifest
    made = slice_store(
        Store(whole), tmp_path / "s", manifest=manifest, progress=lambda *counts: told.append(counts)
    )
    assert told == [(0, 1), (1, 1)]  # the other part is there
    assert len(made.parts) == 2
    assert {file.name: file.stat().st_ino for file in (tmp_path / "s/parts/shard-000000").iterdir()} == before


def test_what_is_not_there_or_damaged_is_not_copied(whole, tmp_path):
    source, stored = Store(whole), Store(whole).manifest
    other = replace(stored.arrays[0], name="elsewhere")
    with pytest.raises(UnknownArray, match="has no array 'elsewhere'"):
        slice_store(source, tmp_path / "s", manifest=replace(stored, arrays=(other,)))
    with pytest.raises(UnknownPart, match="no finished part 'shard-9'"):
        slice_store(source, tmp_path / "s", manifest=stored, parts=["shard-9"])
    assert not (tmp_path / "s").exists()
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    flip_bit(damaged / "parts/shard-000000/hidden/c/0/0", offset=30)
    with pytest.raises(CorruptPart, match=r"hidden/c/0/0 is damaged: its blake3 is not the one in part.json"):
        slice_store(Store(damaged), tmp_path / "s", manifest=stored)
    assert Store(tmp_path / "s").parts == () and not list((tmp_path / "s/tmp").iterdir())


def test_a_merge_has_the_parts_of_all_and_is_the_store_that_one_writer_makes(whole, tmp_path):
    halves = [
        slice_store(Store(whole), tmp_path / part, manifest=Store(whole).manifest, parts=[part])
        for part in Store(whole).parts
    ]
    merged = merge_stores([*halves, halves[0]], tmp_path / "merged")  # a part twice is a part once
    assert summarise(merged.path).content == summarise(whole).content
    assert verify(merged.path, deep=True).problems == ()


def test_stores_that_hold_different_things_are_not_merged(whole, tmp_path):
    other = StoreWriter.open(tmp_path / "other", manifest(fingerprint=replace(FINGERPRINT, template="00")))
    with pytest.raises(FingerprintMismatch, match=r"template: 7a -> 00\. Merge stores made as"):
        merge_stores([Store(whole), Store(other.path)], tmp_path / "merged")
    same_name = StoreWriter.open(tmp_path / "same", manifest())
    with same_name.part("shard-000000", source={}) as part:
        fill_part(part, "other")
        part.commit()
    with pytest.raises(
        PartConflict, match=r"'shard-000000' is in .* with different content; leave one of them out"
    ):
        merge_stores([Store(whole), Store(same_name.path)], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# The commands


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code  # type: ignore[return-value]


def test_stage_2_trains_from_a_slice_as_from_a_store_made_for_its_targets(experiment, tmp_path, capsys):
    assert run("slice", experiment.store, tmp_path / "slice", "--targets", "logits") == 0
    assert "3 parts, 13 samples, input_ids, labels, logits/ids" in capsys.readouterr().out
    without = [f"losses.{name}=null" for name in ("attention", "vision_all", "vision_focus")]
    without += ["targets.attention=null", "targets.vision=null"]
    sliced = experiment.config(tmp_path, *without, f"cache.path={tmp_path}/slice")
    train_student(sliced, tmp_path / "from_slice")
    made = experiment.config(tmp_path, *without, f"cache.path={tmp_path}/made")
    cache_teacher(made)
    assert stored_arrays(tmp_path / "slice").keys() == stored_arrays(tmp_path / "made").keys()
    assert (
        summarise(tmp_path / "slice").fingerprint["capture"]
        == summarise(tmp_path / "made").fingerprint["capture"]
    )


def test_a_slice_of_a_target_that_is_not_there_names_those_that_are(experiment, tmp_path, capsys):
    assert run("slice", experiment.store, tmp_path / "s", "--targets", "hidden") == 2
    assert "holds no 'hidden'; it holds attention, logits, vision" in capsys.readouterr().err


def test_a_fraction_of_the_parts_and_its_merge_with_the_rest(experiment, tmp_path, capsys):
    assert run("slice", experiment.store, tmp_path / "third", "--fraction", "0.34") == 0
    assert Store(tmp_path / "third").parts == ("shard-000000",)
    parts = "shard-000001,shard-000002"
    assert run("slice", experiment.store, tmp_path / "rest", "--parts", parts) == 0
    assert run("merge", tmp_path / "third", tmp_path / "rest", tmp_path / "merged") == 0
    assert summarise(tmp_path / "merged").content == summarise(experiment.store).content
    assert run("merge", tmp_path / "third", tmp_path / "merged") == 2


def test_gc_removes_what_the_dead_left_and_no_part(whole, tmp_path, capsys):
    store = Path(shutil.copytree(whole, tmp_path / "s"))
    before = snapshot(store)
    dead = f"shard-000000.{cli_host()}.4194305.01234567"
    for name in (dead, "shard-000001.another-host.17.00ff00ff"):
        (store / "tmp" / name / "inner").mkdir(parents=True)
    assert run("gc", store) == 0
    assert capsys.readouterr().out == f"{dead}\n{store}: 1 unfinished parts removed\n"
    assert run("gc", store, "--hours", "1") == 0  # too young
    for path in (store / "tmp").rglob("*"):
        os.utime(path, (0, 0))
    assert run("gc", store, "--hours", "1") == 0
    assert not list((store / "tmp").iterdir()) and snapshot(store) == before


def cli_host() -> str:
    from cache.write.scratch import this_host

    return this_host()
