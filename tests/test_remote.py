"""Stores behind URLs: what is read there is what is on the disk, from S3's API and from static servers."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import fsspec
import numpy as np
import pytest
from servers import Secretive, Static, StaticWithRanges, static_server
from small_experiment import log_of, weights
from small_store import entry, flip_bit, sample_arrays, write_store

import cli
from cache import (
    CorruptPart,
    Mirror,
    NotThere,
    Store,
    StoreNotFound,
    StoreUnreachable,
    StoreWriter,
    push_store,
    summarise,
    verify,
)
from cache.files.remote import unreachable
from pipeline.distill.student import train_student

pytestmark = pytest.mark.slow


def alignkd(*arguments: str) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def pushed(bucket, experiment) -> str:
    """The experiment's store, in a bucket."""
    alignkd("push", str(experiment.store), f"{bucket}/teacher.zarr")
    return f"{bucket}/teacher.zarr"


@pytest.fixture
def impatient(monkeypatch):
    """A server that does not answer is asked again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def same(ours: Store, theirs: Store) -> bool:
    names = list(theirs.manifest.specs)
    arrays = [(ours.read(key, names), theirs.read(key, names)) for key in theirs.keys()]  # noqa: SIM118
    return list(ours.keys()) == list(theirs.keys()) and all(
        np.array_equal(a[name], b[name]) for a, b in arrays for name in names
    )


def losses(config, folder: Path) -> tuple[list[float], dict]:
    model = train_student(config, folder)
    return [line["loss"] for line in log_of(folder) if "loss" in line], weights(model)


def test_a_store_in_a_bucket_reads_as_on_the_disk(pushed, experiment):
    remote, local = Store(pushed), Store(experiment.store)
    assert remote.parts == local.parts and same(remote, local)
    assert [remote.rejects(part) for part in remote.parts] == [local.rejects(part) for part in local.parts]
    assert summarise(pushed).content == summarise(experiment.store).content
    assert same(pickle.loads(pickle.dumps(remote)), local)


def test_stage_2_trains_from_a_bucket_with_the_losses_of_the_disk(pushed, experiment, tmp_path):
    here = losses(experiment.config(tmp_path / "a"), tmp_path / "a")
    there = losses(experiment.config(tmp_path / "b", f"cache.path={pushed}"), tmp_path / "b")
    assert here[0] == there[0] and len(here[0]) == 2
    assert all((here[1][name] == there[1][name]).all() for name in here[1])


def test_two_loading_workers_read_a_bucket_through_a_mirror(pushed, experiment, tmp_path):
    workers = "train.dataloader_num_workers=2"
    here = losses(experiment.config(tmp_path / "a", workers), tmp_path / "a")
    mirrored = [f"cache.path={pushed}", f"cache.mirror={tmp_path / 'mirror'}"]
    there = losses(experiment.config(tmp_path / "b", workers, *mirrored), tmp_path / "b")
    assert here[0] == there[0] and any((tmp_path / "mirror").rglob("*"))


@pytest.mark.parametrize("handler", [Static, StaticWithRanges])
def test_a_static_server_will_do_with_ranges_or_without(tmp_path, experiment, handler):
    with static_server(experiment.store.parent, handler) as (url, _):
        address = f"{url}/{experiment.store.name}"
        assert same(Store(address), Store(experiment.store))
        here = losses(experiment.config(tmp_path / "a"), tmp_path / "a")
        there = losses(experiment.config(tmp_path / "b", f"cache.path={address}"), tmp_path / "b")
        assert here[0] == there[0]


def test_a_sample_costs_one_round_of_requests_and_only_its_chunks(tmp_path):
    path = write_store(tmp_path / "s")
    with static_server(tmp_path) as (url, requests):
        store = Store(f"{url}/s")
        store.read("a0", ["hidden"])
        requests.clear()
        store.read("b0", ["hidden", "vision"])
        files = sorted(name.removeprefix("/s/parts/shard-000001/") for name, _ in requests)
        # Metadata of both, the indexes at their shards' ends, one chunk each.
        hidden, vision = ["hidden/c/0/0"] * 2, ["vision/c/0/0/0"] * 2
        assert files == [*hidden, "hidden/zarr.json", *vision, "vision/zarr.json"]
        requests.clear()
        store.read("b1", ["hidden", "vision"])
        assert requests == [] and path.exists()


def test_verify_reads_a_bucket_to_the_last_byte(bucket, tmp_path):
    write_store(tmp_path / "s")
    push_store(Store(tmp_path / "s"), f"{bucket}/verified", card=b"# card\n")
    report = verify(f"{bucket}/verified", deep=True)
    assert report.problems == () and report.samples == 6
    s3 = fsspec.filesystem("s3")
    name = "lab/verified/parts/shard-000000/hidden/c/0/0"
    data = bytearray(s3.cat_file(name))
    data[3] ^= 1
    s3.pipe_file(name, bytes(data))
    s3.rm_file("lab/verified/parts/shard-000001/vision/zarr.json")
    found = {(problem.kind, problem.file) for problem in verify(f"{bucket}/verified", deep=True).problems}
    assert ("checksum", "parts/shard-000000/hidden/c/0/0") in found
    assert ("missing file", "parts/shard-000001/vision/zarr.json") in found
    with pytest.raises(CorruptPart, match=r"s3://lab/verified/.*hidden/c/0/0 is damaged .*'a0'.*crc32c"):
        Store(f"{bucket}/verified").read("a0", ["hidden"])


def test_what_is_not_there_is_told_in_one_sentence(bucket, tmp_path, capsys, impatient):
    with pytest.raises(StoreNotFound, match=r"No teacher store at s3://lab/nothing: .*no such file there"):
        Store(f"{bucket}/nothing")
    with pytest.raises(StoreUnreachable, match=r"http://127.0.0.1:9/s.* cannot be reached \(.*check the URL"):
        Store("http://127.0.0.1:9/s")
    with pytest.raises(StoreUnreachable, match=r"gopher://x.*give a local path or an s3://"):
        Store("gopher://x/s")
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", f"{bucket}/nothing"])
    assert caught.value.code == 1 and "No teacher store at s3://lab/nothing" in capsys.readouterr().err


def test_a_server_that_forbids_what_is_absent_may_mean_that(tmp_path, impatient):
    write_store(tmp_path / "s")
    with static_server(tmp_path, Secretive) as (url, _):
        assert len(Store(f"{url}/s")) == 6
        shutil.rmtree(tmp_path / "s" / "parts" / "shard-000001")
        for name in ("s", "nothing"):
            with pytest.raises(StoreUnreachable) as caught:
                Store(f"{url}/{name}")
            assert "403" in str(caught.value) and "may also mean that it is not there" in str(caught.value)
        assert "/nothing/manifest.json cannot be reached" in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Forbidden"), HTTPError("", 403, "", Message(), None)])
def test_every_spelling_of_403_may_mean_that_nothing_is_there(error):
    assert "may also mean that it is not there" in str(unreachable("s3://lab/s", error))
    assert "not there" not in str(unreachable("s3://lab/s", OSError(5, "Input/output error")))


@pytest.mark.slow
def test_a_missing_driver_is_named_with_its_extra(monkeypatch):
    def without(url: str):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(StoreUnreachable, match=r"Install s3fs.*pip install 'alignkd\[s3\]'"):
        Store("s3://lab/teacher.zarr")


def test_stage_1_does_not_write_behind_a_url(bucket, experiment, tmp_path, capsys):
    for command in ("teacher-cache", "plan"):
        with pytest.raises(SystemExit):
            cli.main(
                [
                    command,
                    "--config",
                    str(experiment.file),
                    f"cache.path={bucket}/new",
                    f"output_dir={tmp_path}",
                ]
            )
        assert "s3://lab/new: a store behind a URL cannot be written by stage 1" in capsys.readouterr().err
    with pytest.raises(NotThere, match="do it in a folder, then `alignkd push`"):
        StoreWriter.open(f"{bucket}/new", Store(experiment.store).manifest)


@pytest.mark.slow
def test_a_mirror_answers_the_second_time_and_stays_within_its_limit(tmp_path):
    write_store(tmp_path / "s")
    with static_server(tmp_path) as (url, requests):
        mirror = Mirror(tmp_path / "mirror", 1_000_000)
        names = list(Store(f"{url}/s").manifest.specs)
        first = Store(f"{url}/s", mirror=mirror).read("a0", names)
        requests.clear()
        second = Store(f"{url}/s", mirror=mirror).read("a0", names)
        assert all(np.array_equal(first[name], second[name]) for name in names)
        assert {name.rsplit("/", 1)[-1] for name, _ in requests} == {"manifest.json", "part.json"}
        small = Mirror(tmp_path / "small", 3000)
        store = Store(f"{url}/s", mirror=small, cache_bytes=0)
        for key in ("a0", "b1", "a2", "b0"):
            store.read(key, names)
            held = sum(file.stat().st_size for file in small.folder.rglob("*") if file.is_file())
            assert 0 < held <= 3000


def test_a_damaged_piece_of_a_mirror_is_fetched_again(tmp_path):
    write_store(tmp_path / "s")
    with static_server(tmp_path) as (url, requests):
        mirror = Mirror(tmp_path / "mirror", 1_000_000)
        expected = Store(f"{url}/s", mirror=mirror).read("a0", ["hidden"])["hidden"]
        pieces = [file for file in mirror.folder.rglob("*") if file.is_file()]
        for piece in pieces:
            flip_bit(piece, offset=-1)
        requests.clear()
        again = Store(f"{url}/s", mirror=mirror).read("a0", ["hidden"])["hidden"]
        assert np.array_equal(expected, again) and any("hidden/c/0/0" in name for name, _ in requests)


def test_a_mirror_never_answers_with_the_bytes_of_a_store_that_was_replaced(tmp_path):
    write_store(tmp_path / "s")
    with static_server(tmp_path) as (url, _):
        mirror = Mirror(tmp_path / "mirror", 1_000_000)
        Store(f"{url}/s", mirror=mirror).read("a0", ["hidden"])
        shutil.rmtree(tmp_path / "s" / "parts" / "shard-000000")
        writer = StoreWriter.open(tmp_path / "s", Store(tmp_path / "s").manifest)
        with writer.part("shard-000000", source={}) as part:
            part.add(entry("a0"), sample_arrays(99))
            part.commit()
        assert np.array_equal(
            Store(f"{url}/s", mirror=mirror).read("a0", ["hidden"])["hidden"], sample_arrays(99)["hidden"]
        )


def test_a_folder_of_a_mirror_that_cannot_be_listed_ends_no_run(tmp_path, monkeypatch):
    gone, mirror = (Mirror(tmp_path / "mirror", 1000, version=letter * 32) for letter in "ab")
    gone.put("piece", b"x")
    listdir, scandir = os.listdir, os.scandir

    def refusing(listed):
        def inner(folder="."):
            if str(folder).endswith("a" * 32):
                raise OSError(errno.ESTALE, "Stale file handle", str(folder))
            return listed(folder)

        return inner

    monkeypatch.setattr(os, "listdir", refusing(listdir))
    monkeypatch.setattr(os, "scandir", refusing(scandir))
    mirror.put("large", b"y" * 960)  # passes the limit: the mirror is swept
    assert mirror.get("large") == b"y" * 960


@pytest.mark.slow
def test_a_mirror_leaves_what_is_not_its_own(tmp_path):
    write_store(tmp_path / "s")
    mine = tmp_path / "mirror" / "notes" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("x" * 5000)
    with static_server(tmp_path) as (url, _):
        store = Store(f"{url}/s", mirror=Mirror(tmp_path / "mirror", 2000), cache_bytes=0)
        for key in list(store.keys()):
            store.read(key, list(store.manifest.specs))
    assert mine.read_text() == "x" * 5000
