"""push and pull: whole or in part, resumed where they stopped, refused where something else lies; and the card."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import yaml
from servers import hub_server, static_server
from small_experiment import stored_arrays
from small_store import FINGERPRINT, fill_part, flip_bit, manifest, write_store

import cli
from cache import (
    CorruptPart,
    FingerprintMismatch,
    NotThere,
    PartConflict,
    Store,
    StoreWriter,
    push_store,
    slice_store,
    summarise,
    verify,
)

CARD = b"# a card\n"
ROOT = Path(__file__).parent.parent
MARKS = [*(f"parts/shard-{number:06d}/part.json" for number in range(3)), "manifest.json"]


def alignkd(*arguments: str) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 0


@pytest.fixture
def whole(tmp_path) -> Path:
    return write_store(tmp_path / "whole")


def test_a_push_that_was_stopped_goes_on_with_what_is_lacking(bucket, whole):
    url, shard = f"{bucket}/resumed", whole / "parts/shard-000001/hidden/c/0/0"
    flip_bit(shard, offset=3)
    with pytest.raises(CorruptPart, match="hidden/c/0/0 is damaged: its blake3"):
        push_store(Store(whole), url, card=CARD)
    with pytest.raises(Exception, match="No teacher store"):
        Store(url)  # its manifest comes last
    flip_bit(shard, offset=3)
    told: list[tuple[int, int]] = []
    pushed = push_store(Store(whole), url, card=CARD, progress=lambda *counts: told.append(counts))
    assert (pushed.sent, pushed.found) == (("shard-000001",), ("shard-000000",)) and pushed.bytes > 0
    assert told == [(0, pushed.bytes), (pushed.bytes, pushed.bytes)]  # not of what is there already
    again = push_store(Store(whole), url, card=CARD)
    assert (again.sent, again.found, again.bytes) == ((), ("shard-000000", "shard-000001"), 0)
    assert summarise(url).content == summarise(whole).content and verify(url, deep=True).problems == ()


def test_stores_of_one_fingerprint_are_pushed_side_by_side(bucket, tmp_path):
    for name, prefix in (("shard-000000", "a"), ("shard-000001", "b")):
        writer = StoreWriter.open(tmp_path / name, manifest(name))
        with writer.part(name, source={}) as part:
            fill_part(part, prefix)
            part.commit()
        push_store(Store(tmp_path / name), f"{bucket}/united", card=CARD)
    assert sorted(Store(f"{bucket}/united").keys()) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_what_lies_there_and_is_something_else_stops_a_push(bucket, whole, tmp_path):
    push_store(Store(whole), f"{bucket}/taken", card=CARD)
    other = StoreWriter.open(
        tmp_path / "other", replace(manifest("shard-000000"), fingerprint=replace(FINGERPRINT, teacher="8e"))
    )
    with pytest.raises(FingerprintMismatch, match=r"teacher: 7e -> 8e.*another URL"):
        push_store(Store(other.path), f"{bucket}/taken", card=CARD)
    same = StoreWriter.open(tmp_path / "same", manifest("shard-000000"))
    with same.part("shard-000000", source={}) as part:
        fill_part(part, "other")
        part.commit()
    with pytest.raises(PartConflict, match="shard-000000"):
        push_store(Store(same.path), f"{bucket}/taken", card=CARD)
    with pytest.raises(NotThere, match="push needs a URL"):
        push_store(Store(whole), str(tmp_path / "folder"), card=CARD)
    with pytest.raises(NotThere, match="cannot be pushed from"):
        push_store(Store(f"{bucket}/taken"), f"{bucket}/copy", card=CARD)


def test_a_pull_of_everything_is_the_store(bucket, experiment, tmp_path, capsys):
    alignkd("push", str(experiment.store), f"{bucket}/t.zarr", "--license", "mit")
    assert "s3://lab/t.zarr: 3 parts sent" in capsys.readouterr().out
    alignkd("pull", f"{bucket}/t.zarr", str(tmp_path / "copy"))
    assert summarise(tmp_path / "copy").content == summarise(experiment.store).content
    assert stored_arrays(tmp_path / "copy").keys() == stored_arrays(experiment.store).keys()


def test_a_pull_of_a_part_of_it_fetches_no_other_files(experiment, tmp_path):
    with static_server(experiment.store.parent) as (url, requests):
        address = f"{url}/{experiment.store.name}"
        asked = ["--targets", "attention", "--fraction", "0.1"]
        alignkd("pull", address, str(tmp_path / "some"), *asked)
        fetched = {name.partition(".zarr/")[2] for name, _ in requests}
        requests.clear()
        alignkd("pull", address, str(tmp_path / "some"), *asked)
        again = {name.partition(".zarr/")[2] for name, _ in requests}
    store = Store(tmp_path / "some")
    assert len(store.parts) == 1 and verify(store.path, deep=True).problems == ()
    assert {name.split("/")[0] for name in store.manifest.specs} == {"attention", "input_ids", "labels"}
    arrays = {name for name in fetched if "/c/" in name}
    assert arrays and all(name.split("/")[1] == store.parts[0] for name in arrays)
    assert not any(part in name for name in fetched for part in ("vision/", "logits/"))
    assert not any("/c/" in name or name.endswith("index.json") for name in again)


@pytest.mark.slow
def test_a_pull_that_was_stopped_goes_on_part_by_part(tmp_path, whole):
    with static_server(tmp_path) as (url, requests):
        shard = whole / "parts/shard-000001/hidden/c/0/0"
        data = shard.read_bytes()
        shard.unlink()
        source = Store(f"{url}/whole")
        with pytest.raises(CorruptPart, match="the file is gone"):
            slice_store(source, tmp_path / "copy", manifest=source.manifest)
        assert Store(tmp_path / "copy").parts == ("shard-000000",)
        shard.write_bytes(data)
        requests.clear()
        slice_store(source, tmp_path / "copy", manifest=source.manifest)
        assert not any("shard-000000/hidden" in name for name, _ in requests)
    assert summarise(tmp_path / "copy").content == summarise(whole).content


def test_the_card_says_what_the_store_is_and_how_to_load_it(bucket, experiment):
    alignkd("push", str(experiment.store), f"{bucket}/carded", "--license", "apache-2.0")
    card = fsspec.filesystem("s3").cat_file("lab/carded/README.md").decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and "zarr" in head["tags"]
    summary = summarise(experiment.store)
    assert summary.content in card and str(experiment.teacher) in card
    assert "alignkd pull s3://lab/carded teacher.zarr" in card and "cache.path: s3://lab/carded" in card
    alignkd("push", str(experiment.store), f"{bucket}/carded")
    assert fsspec.filesystem("s3").cat_file("lab/carded/README.md").decode() == card  # the licence stays
    assert "Given away under apache-2.0." in card and "the teacher's licence and the data's may bind" in card
    for array in summary.arrays:
        assert f"| `{array.name}` |" in card and array.stated_error.replace("|", "&#124;") in card


def test_the_hub_gets_a_commit_a_part_and_gives_the_store_back(experiment, tmp_path):
    url, copy = "hf://datasets/lab/store/teacher.zarr", tmp_path / "copy"
    with hub_server() as (address, commits):
        # huggingface_hub takes its address when it is imported, hence another process.
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_testing", "HF_HUB_OFFLINE": "0"}
        for command in (["push", str(experiment.store), url], ["pull", url, str(copy)]):
            done = subprocess.run(
                [sys.executable, "cli.py", *command],
                env=environment,
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            assert done.returncode == 0, done.stderr
    assert len(commits) == 4 and all(
        f"teacher.zarr/{name}" in c for name, c in zip(MARKS, commits, strict=True)
    )
    assert summarise(copy).content == summarise(experiment.store).content
