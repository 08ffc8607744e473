"""What the system refuses to read is reported as that, with what to do about it, and never as damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from refusals import closed, few_open_files, open_folder, put_on_a_failing_disk, without_rights
from small_experiment import write_shard
from small_store import fill_part, manifest, sample_arrays, write_store

from cache import CorruptFile, CorruptPart, Span, Store, StoreWriter, UnreadableFile, verify
from cache.files.local_files import max_open, read_ranges, sizes_below
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import read_shard
from pipeline.data.spans import read_span
from pipeline.errors import ShardError

PART = "shard-000000"
SHARD = f"parts/{PART}/hidden/c/0/0"


def _error(number: int) -> UnreadableFile:
    return UnreadableFile("parts/a/part.json", OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("number", "reason", "remedy"),
    [
        (errno.ENOENT, "No such file or directory", "correct the path"),
        (errno.EACCES, "Permission denied", "ask its owner for access"),
        (errno.EPERM, "Operation not permitted", "ask its owner for access"),
        (errno.EMFILE, "Too many open files", "`ulimit -n`"),
        (errno.ENFILE, "Too many open files in system", "`ulimit -n`"),
        (errno.EIO, "Input/output error", "says nothing about what it holds"),
        (errno.ESTALE, "Stale file handle", "says nothing about what it holds"),
    ],
)
def test_an_error_of_the_system_says_which_file_why_and_what_to_do(number: int, reason: str, remedy: str):
    message = str(_error(number))
    assert message.startswith(f"parts/a/part.json cannot be read ({reason}); ")
    assert remedy in message and "damaged" not in message and "remove" not in message
    assert not isinstance(_error(number), CorruptFile)


# Open files


def test_a_batch_over_more_parts_than_may_be_open_is_read(tmp_path: Path):
    names = [f"shard-{number:06d}" for number in range(12)]
    writer = StoreWriter.open(tmp_path / "s", manifest(*names))
    for name in names:
        with writer.part(name, source={}) as part:
            fill_part(part, name)
            part.commit()
    store = Store(tmp_path / "s")
    keys, arrays = [f"{name}1" for name in names], list(sample_arrays(0))
    with few_open_files(spare=60):
        assert max_open() < len(arrays) * len(names)
        found = list(store.read_many(keys, [*arrays, "vision"]))
    whole = list(Store(tmp_path / "s").read_many(keys, [*arrays, "vision"]))
    for mine, theirs in zip(found, whole, strict=True):
        assert all((mine[name] == theirs[name]).all() for name in mine)
    assert np.array_equal(found[0]["hidden"], sample_arrays(11, num_rows=3)["hidden"])


@pytest.mark.parametrize("repeats", [1, 3])
def test_as_many_files_are_open_as_may_be_and_all_are_closed_again(tmp_path: Path, repeats: int):
    """In whatever order the ranges come: each file's one after another, or every file's first, then its second."""
    files = [tmp_path / str(number) for number in range(100)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number, number + 1]))
    ranges = [(file, place, place + 1) for _ in range(repeats) for file in files for place in (0, 1)]
    found: list[bytes | None] = []
    most = 0
    with few_open_files(spare=60):
        before = len(os.listdir("/proc/self/fd"))
        for data in read_ranges(ranges):
            found.append(data)
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        assert most == max_open() and len(os.listdir("/proc/self/fd")) == before
    assert found == [bytes([n + place]) for _ in range(repeats) for n in range(100) for place in (0, 1)]


def test_no_open_file_left_is_no_damage(tmp_path: Path):
    store = Store(write_store(tmp_path / "s"))
    assert len(store) == 6 and store.rejects(PART)
    with few_open_files(spare=0), pytest.raises(UnreadableFile, match=r"Too many open files.*ulimit -n"):
        store.read("a0", ["hidden"])
    assert store.read("a0", ["hidden"])["hidden"].shape == (5, 4)


# Rights and disks

STORE_FILES = [SHARD, f"parts/{PART}/hidden/zarr.json", f"parts/{PART}/rejects.jsonl"]


@pytest.mark.parametrize("name", STORE_FILES)
def test_a_file_of_another_user_is_no_damage(name: str):
    with open_folder() as folder:
        store = Store(write_store(folder / "s"))
        assert "a0" in store
        with (
            closed(folder / "s" / name),
            without_rights(),
            pytest.raises(UnreadableFile, match=rf"{name} cannot be read \(Permission denied\); ask"),
        ):
            _read_all(store)
        _read_all(store)


def test_a_chunk_on_a_disk_that_fails_is_no_damage(tmp_path: Path):
    store = Store(write_store(tmp_path / "s"), cache_bytes=0)
    store.read("a0", ["hidden"])
    put_on_a_failing_disk(tmp_path / "s" / SHARD)
    with pytest.raises(UnreadableFile, match=rf"{SHARD} cannot be read \(Input/output error\)"):
        store.read("a0", ["hidden"])


def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path: Path):
    store = Store(write_store(tmp_path / "s"), cache_bytes=0)
    store.read("a0", ["hidden"])
    (tmp_path / "s" / SHARD).unlink()
    (tmp_path / "s" / SHARD).mkdir()
    with pytest.raises(CorruptPart, match="the file is gone"):
        store.read("a0", ["hidden"])


def test_what_is_damaged_is_captured_again_by_a_command_and_not_removed_by_hand(tmp_path: Path):
    store = Store(write_store(tmp_path / "s"))
    (tmp_path / "s" / SHARD).unlink()
    with pytest.raises(CorruptPart) as caught:
        store.read("a0", ["hidden"])
    assert "alignkd verify --deep" in str(caught.value) and "verify --fix --config" in str(caught.value)
    assert "remove" not in str(caught.value)


@pytest.mark.parametrize("name", [f"parts/{PART}", "parts", ""])
def test_a_folder_that_this_user_may_not_enter_is_not_taken_as_unfinished(name: str):
    with open_folder() as folder:
        path = write_store(folder / "s")
        with (
            closed(path / name),
            without_rights(),
            pytest.raises(
                UnreadableFile, match=r"cannot be read \(Permission denied\); ask its owner"
            ) as caught,
        ):
            Store(path)
        assert str(caught.value).startswith(str(path / name))
        assert Store(path).parts == (PART, "shard-000001")


def test_a_folder_inside_a_part_that_this_user_may_not_enter_is_no_damage():
    with open_folder() as folder:
        store = Store(write_store(folder / "s"))
        with (
            closed((folder / "s" / SHARD).parent),
            without_rights(),
            pytest.raises(UnreadableFile, match=SHARD),
        ):
            store.read("a0", ["hidden"])


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_sizes_are_of_what_can_be_seen_only_where_that_is_asked_for(mode: int):
    with open_folder() as folder:
        path = write_store(folder / "s")
        whole = sizes_below(path)
        assert whole == {f: (path / f).stat().st_size for f in whole} and f"parts/{PART}/part.json" in whole
        with closed(path / "parts" / PART, mode), without_rights():
            with pytest.raises(UnreadableFile, match="Permission denied"):
                sizes_below(path)
            seen = sizes_below(path, leave_out_unreadable=True)
        assert seen == {file: size for file, size in whole.items() if not file.startswith(f"parts/{PART}/")}


def test_what_lies_in_parts_and_is_no_part_is_left_out(tmp_path: Path):
    path = write_store(tmp_path / "s")
    (path / "parts" / ".DS_Store").write_bytes(b"x")
    (path / "parts" / "begun").mkdir()
    (path / "parts" / "odd" / "part.json").mkdir(parents=True)
    assert Store(path).parts == (PART, "shard-000001")


def _read_all(store: Store) -> None:
    store.read("a0", ["hidden"])
    store.rejects(PART)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        f"parts/{PART}",
        f"parts/{PART}/hidden",
        f"parts/{PART}/part.json",
        f"parts/{PART}/index.json",
        f"parts/{PART}/rejects.jsonl",
        f"parts/{PART}/hidden/zarr.json",
    ],
)
def test_verify_lists_what_cannot_be_read_and_counts_no_part_as_damaged(name: str, deep: bool):
    with open_folder() as folder:
        path = write_store(folder / "s")
        with closed(path / name), without_rights():
            report = verify(path, deep=deep)
        assert {problem.kind for problem in report.problems} == {"unreadable"} and not report.is_sound
        assert all(problem.file.startswith(name) for problem in report.problems)
        assert report.damaged_parts == () and verify(path, deep=True).is_sound


# Shards


@pytest.fixture
def shard_folder():
    with open_folder() as folder:
        write_shard(folder / "a.tar", [("x.json", b'{"conversations": []}')])
        yield folder


@pytest.mark.parametrize("read", [lambda f: list(read_shard(f)), lambda f: read_span(f, Span("x", 512, 4))])
def test_a_shard_of_another_user_is_no_damaged_shard(shard_folder: Path, read):
    shard = shard_folder / "a.tar"
    with (
        closed(shard),
        without_rights(),
        pytest.raises(ShardError, match=r"a.tar cannot be read \(Permission denied\); ask its owner"),
    ):
        read(shard)
    read(shard)


@pytest.mark.parametrize("read", [lambda f: list(read_shard(f)), lambda f: read_span(f, Span("x", 0, 4))])
def test_a_shard_on_a_disk_that_fails_is_no_damaged_shard(shard_folder: Path, read):
    shard = shard_folder / "a.tar"
    put_on_a_failing_disk(shard)
    with pytest.raises(ShardError, match=r"a.tar cannot be read \(Input/output error\); this says nothing"):
        read(shard)


def test_a_shard_read_while_no_file_may_be_opened_is_no_damaged_shard(shard_folder: Path):
    with few_open_files(spare=0), pytest.raises(ShardError, match=r"Too many open files.*ulimit -n"):
        list(read_shard(shard_folder / "a.tar"))


@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar", "*/inner/*.tar", "mine*/inner/*.tar"])
def test_shards_of_a_folder_that_this_user_may_not_enter_are_not_left_out(shard_folder: Path, pattern: str):
    for name in ("mine", "theirs"):
        (shard_folder / name / "inner").mkdir(parents=True)
        for place in ("", "inner"):
            shard = shard_folder / name / place / f"{name}-{place}.tar"
            shard.write_bytes((shard_folder / "a.tar").read_bytes())
    with closed(shard_folder / "theirs"), without_rights():
        if pattern.startswith("mine"):
            assert len(expand_shards(str(shard_folder / pattern))) == 1
        else:
            with pytest.raises(ShardError, match=r"theirs cannot be read \(Permission denied\)"):
                expand_shards(str(shard_folder / pattern))
    assert expand_shards(str(shard_folder / pattern))
