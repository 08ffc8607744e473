"""Stores where they are found: behind links as the Hub's cache has them, and on media that nobody may write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from refusals import open_folder, without_rights
from small_store import snapshot, write_store

import cli
from cache import Store, slice_store, summarise, verify
from cache.files.durable import hash_file


def behind_links(store: Path, cache: Path) -> Path:
    """The store as `huggingface_hub` keeps it: links to files that are named by their hash."""
    snapshot = cache / "snapshots" / "main"
    (cache / "blobs").mkdir(parents=True)
    for file in (file for file in store.rglob("*") if file.is_file()):
        blob = cache / "blobs" / hash_file(file)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("deep", [False, True])
def test_a_store_behind_links_is_the_store(tmp_path: Path, deep: bool):
    store = write_store(tmp_path / "s")
    linked = behind_links(store, tmp_path / "cache")
    there, here = verify(linked, deep=deep), verify(store, deep=deep)
    assert there.problems == () and (there.bytes, there.files) == (here.bytes, here.files)
    assert summarise(linked).content == summarise(store).content
    copy = slice_store(Store(linked), tmp_path / "copy", manifest=Store(linked).manifest)
    assert verify(copy.path, deep=True).problems == ()


def test_parts_that_are_links_to_folders_are_parts(tmp_path: Path):
    store = write_store(tmp_path / "s")
    linked = Path(shutil.copytree(store, tmp_path / "linked"))
    for part in sorted((linked / "parts").glob("shard-*")):
        shutil.rmtree(part)
        part.symlink_to(store / "parts" / part.name)
    assert verify(linked, deep=True).problems == ()
    assert verify(linked, deep=False).bytes == verify(store, deep=False).bytes
    assert list(Store(linked).keys()) == list(Store(store).keys())


def test_links_in_a_circle_and_to_nothing_end(tmp_path: Path):
    store = write_store(tmp_path / "s")
    before = verify(store, deep=False)
    (store / "parts" / "shard-000000" / "hidden" / "up").symlink_to(store)
    (store / "parts" / "shard-000000" / "gone").symlink_to(tmp_path / "nothing")
    found = verify(store, deep=True)
    assert (found.bytes, found.files) == (before.bytes, before.files)


def test_a_link_to_a_file_that_is_gone_is_a_missing_file(tmp_path: Path):
    linked = behind_links(write_store(tmp_path / "s"), tmp_path / "cache")
    shard = linked / "parts" / "shard-000000" / "hidden" / "c" / "0" / "0"
    shard.resolve().unlink()
    problems = {(problem.kind, problem.file) for problem in verify(linked, deep=False).problems}
    assert ("missing file", "parts/shard-000000/hidden/c/0/0") in problems


# On media that nobody may write to


@pytest.fixture(scope="module")
def read_only(experiment) -> Iterator[Path]:
    """The whole experiment for a user who may read it; of the store nothing but what a reader needs."""
    with open_folder() as folder:
        for place in (experiment.teacher, experiment.student, experiment.shards, experiment.held_out):
            shutil.copytree(place, folder / place.name)
        shutil.copytree(experiment.store, folder / "teacher.zarr")
        text = experiment.file.read_text().replace(str(experiment.file.parent), str(folder))
        (folder / "config.yaml").write_text(text)
        (folder / "out").mkdir()
        for name in ("tmp", "leases"):
            shutil.rmtree(folder / "teacher.zarr" / name, ignore_errors=True)
        for place in folder.rglob("*"):
            place.chmod(0o555 if place.is_dir() else 0o444)
        (folder / "out").chmod(0o777)
        yield folder
        for place in (place for place in folder.rglob("*") if place.is_dir()):
            place.chmod(0o755)


COMMANDS = {
    "info": ["info", "STORE"],
    "verify": ["verify", "STORE", "--deep"],
    "check": ["check", "STORE", "--samples", "2", "--config", "CONFIG"],
    "plan": ["plan", "--config", "CONFIG", "--samples", "8", "output_dir=OUT/plan"],
    "inspect": ["inspect", "sample", "STORE", "a0", "--config", "CONFIG"],
    "attention": ["inspect", "attention", "STORE", "a0", "--config", "CONFIG", "--out", "OUT/a.png"],
    "distill": ["distill", "--config", "CONFIG", "output_dir=OUT/run", "evaluate=null"],
    "slice": ["slice", "STORE", "OUT/slice.zarr", "--targets", "logits"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_reads_needs_no_right_to_write(command: str, read_only: Path, capsys):
    before = snapshot(read_only / "teacher.zarr")
    # The first time imports what the second may have no right to import.
    for output, user in (("first", nullcontext), ("second", without_rights)):
        (read_only / "out" / command / output).mkdir(parents=True)
        (read_only / "out" / command / output).chmod(0o777)
        places = {"STORE": "teacher.zarr", "CONFIG": "config.yaml", "OUT": f"out/{command}/{output}"}
        words = COMMANDS[command]
        for name, place in places.items():
            words = [word.replace(name, str(read_only / place)) for word in words]
        with user(), pytest.raises(SystemExit) as ended:
            cli.main(words)
        told = capsys.readouterr()
        assert ended.value.code == 0, told.err + told.out
        assert snapshot(read_only / "teacher.zarr") == before


def test_a_command_that_writes_says_that_it_may_not(read_only: Path, capsys):
    with without_rights(), pytest.raises(SystemExit) as ended:
        cli.main(["teacher-cache", "--config", str(read_only / "config.yaml")])
    assert ended.value.code == 1
    assert "alignkd: [Errno 13] Permission denied" in capsys.readouterr().err
