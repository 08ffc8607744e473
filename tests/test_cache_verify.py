"""Verify names the file of every kind of damage; info adds up what the store holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from small_store import (
    flip_bit,
    rewrite_record,
    write_clashing_store,
    write_store,
)

from cache import StoreNotFound, verify
from cache.format.documents import document_bytes, read_document
from cache.format.records import read_part_record

PART = "parts/shard-000000"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("verify") / "teacher.zarr")


@pytest.fixture
def store(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def problems(store: Path, *, deep: bool = False) -> set[tuple[str, str]]:
    return {(problem.kind, problem.file) for problem in verify(store, deep=deep).problems}


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_store_has_no_problems(sound: Path, deep: bool) -> None:
    report = verify(sound, deep=deep)
    assert report.is_sound and report.parts == 2 and report.samples == 6
    files = [file for file in sound.rglob("*") if file.is_file()]
    assert report.files == len(files) and report.bytes == sum(file.stat().st_size for file in files)
    assert json.loads(json.dumps(report.to_json()))["problems"] == []


def test_what_is_read_is_counted_up_to_what_is_to_be_read(sound: Path, store: Path) -> None:
    told: list[tuple[int, int]] = []
    verify(sound, deep=True, progress=lambda *counts: told.append(counts))
    files = [file for file in (sound / "parts").rglob("*/*") if file.is_file() and file.name != "part.json"]
    values = [file for file in files if "c" in file.relative_to(sound).parts]
    marks = list(sound.glob("parts/*/part.json"))
    total = sum(file.stat().st_size for file in [*files, *marks, *values])
    assert told[0] == (0, total) and told[-1] == (total, total)
    assert told == sorted(told) and len(told) > len(files)
    before_the_end = told[-2][0] / total
    assert 0.7 < before_the_end <= 1  # the rest: part.json, and the chunks' places in their files
    (store / "parts/shard-000000/part.json").unlink()
    told.clear()
    verify(store, deep=True, progress=lambda *counts: told.append(counts))
    assert told[-1][0] == told[-1][1]
    told.clear()
    verify(store, deep=False, progress=lambda *counts: told.append(counts))
    assert told == []


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read_document(file)
    change(content)
    file.write_bytes(document_bytes(content))


def rewrite_index(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(part / "index.json", change)
    rewrite_record(part)


def store_value(part: Path, name: str, value: float, row: int) -> None:
    """Put a value into a stored array as no writer of ours would, with every checksum right."""
    array: Any = zarr.open_array(str(part / name), mode="r+")
    values = array[...]
    values[row] = value
    array[...] = values
    rewrite_record(part)


def reject_line(part: Path, text: str) -> None:
    (part / "rejects.jsonl").write_text(text)
    rewrite_record(part)


def recount(part: Path, **changes: int) -> None:
    rewrite_record(part, counts=replace(read_part_record(part).counts, **changes))


def move_tmp(store: Path) -> None:
    shutil.copytree(store / PART, store / "tmp/shard-000000.otherhost.17.00ff00ff")


DAMAGE: list[tuple[str, Callable[[Path], Any], set[tuple[str, str]]]] = [
    ("missing part", lambda s: shutil.rmtree(s / PART), {("missing part", PART)}),
    ("unfinished part", lambda s: (s / PART / "part.json").unlink(), {("unfinished part", PART)}),
    ("left in tmp", move_tmp, {("unfinished part", "tmp/shard-000000.otherhost.17.00ff00ff")}),
    ("odd in tmp", lambda s: (s / "tmp/x").touch(), {("unfinished part", "tmp/x")}),
    ("no manifest", lambda s: (s / "manifest.json").unlink(), {("missing file", "manifest.json")}),
    ("no root group", lambda s: (s / "zarr.json").unlink(), {("missing file", "zarr.json")}),
    ("no group", lambda s: (s / "parts/zarr.json").unlink(), {("missing file", "parts/zarr.json")}),
    (
        "no shard",
        lambda s: (s / PART / "vision/c/0/0/0").unlink(),
        {("missing file", f"{PART}/vision/c/0/0/0")},
    ),
    (
        "no rejects",
        lambda s: (s / PART / "rejects.jsonl").unlink(),
        {("missing file", f"{PART}/rejects.jsonl")},
    ),
    ("no index", lambda s: (s / PART / "index.json").unlink(), {("missing file", f"{PART}/index.json")}),
    (
        "no array",
        lambda s: (shutil.rmtree(s / PART / "vision"), rewrite_record(s / PART)),
        {("missing file", f"{PART}/vision/zarr.json")},
    ),
    ("file beside the parts", lambda s: (s / "notes").touch(), {("unexpected file", "notes")}),
    ("file in parts", lambda s: (s / "parts/notes").touch(), {("unexpected file", "parts/notes")}),
    ("file in a part", lambda s: (s / PART / "notes").touch(), {("unexpected file", f"{PART}/notes")}),
    ("stray file", lambda s: (s / PART / ".DS_Store").touch(), {("stray file", f"{PART}/.DS_Store")}),
    ("stray in parts", lambda s: (s / "parts/.nfs00ff").touch(), {("stray file", "parts/.nfs00ff")}),
    (
        "unreadable",
        # Reading a process's memory at 0 is an input/output error, for root too.
        lambda s: ((s / PART / "part.json").unlink(), (s / PART / "part.json").symlink_to("/proc/self/mem")),
        {("unreadable", f"{PART}/part.json")},
    ),
    (
        "part not planned",
        lambda s: shutil.copytree(s / PART, s / "parts/extra"),
        {("unexpected file", "parts/extra")},
    ),
    (
        "longer shard",
        lambda s: (s / PART / "hidden/c/0/0").open("ab").write(b"x"),
        {("size", f"{PART}/hidden/c/0/0")},
    ),
    ("manifest", lambda s: flip_bit(s / "manifest.json", offset=30), {("checksum", "manifest.json")}),
    ("part.json", lambda s: flip_bit(s / PART / "part.json", offset=30), {("checksum", f"{PART}/part.json")}),
    (
        "index.json",
        lambda s: flip_bit(s / PART / "index.json", offset=30),
        {("checksum", f"{PART}/index.json")},
    ),
    (
        "rejects",
        lambda s: flip_bit(s / PART / "rejects.jsonl", offset=3),
        {("checksum", f"{PART}/rejects.jsonl")},
    ),
    (
        "array metadata",
        lambda s: flip_bit(s / PART / "vision/zarr.json", offset=9),
        {("checksum", f"{PART}/vision/zarr.json")},
    ),
    ("root group", lambda s: flip_bit(s / "zarr.json", offset=3), {("metadata", "zarr.json")}),
    ("sum", lambda s: recount(s / PART, seen=5), {("count", f"{PART}/part.json")}),
    ("rejected", lambda s: recount(s / PART, seen=5, rejected=2), {("count", f"{PART}/rejects.jsonl")}),
    ("cached", lambda s: recount(s / PART, seen=5, cached=4), {("count", f"{PART}/index.json")}),
    ("images", lambda s: recount(s / PART, images=9), {("count", f"{PART}/index.json")}),
    (
        "falling offsets",
        lambda s: rewrite_index(s / PART, lambda index: index["rows"].update(hidden=[0, 9, 8, 13])),
        {("count", f"{PART}/index.json")},
    ),
    (
        "offsets of a shorter array",
        lambda s: rewrite_index(s / PART, lambda index: index["rows"].update(hidden=[0, 5, 8, 12])),
        {("count", f"{PART}/hidden/zarr.json")},
    ),
    (
        "column of another length",
        lambda s: rewrite_index(s / PART, lambda index: index["json"]["size"].pop()),
        {("count", f"{PART}/index.json")},
    ),
    (
        "image that is not there",
        lambda s: rewrite_index(s / PART, lambda index: index["images"].update(number=[0, 1, 7])),
        {("count", f"{PART}/index.json")},
    ),
    (
        "array without offsets",
        lambda s: rewrite_index(s / PART, lambda index: index["rows"].pop("hidden")),
        {("count", f"{PART}/index.json")},
    ),
    (
        "other store",
        lambda s: rewrite_record(s / PART, contents="00"),
        {("foreign part", f"{PART}/part.json")},
    ),
    ("other name", lambda s: rewrite_record(s / PART, part="x"), {("metadata", f"{PART}/part.json")}),
    ("no JSON in rejects", lambda s: reject_line(s / PART, "?"), {("metadata", f"{PART}/rejects.jsonl")}),
    (
        "manifest of another format",
        lambda s: edit(s / "manifest.json", lambda content: content.update(format_version=7)),
        {("metadata", "manifest.json")},
    ),
    (
        "part of another format",
        lambda s: edit(s / PART / "part.json", lambda content: content.update(format_version=7)),
        {("metadata", f"{PART}/part.json")},
    ),
    (
        "file name that leaves the part",
        lambda s: edit(s / PART / "part.json", lambda content: content["files"].update({"../x": {}})),
        {("metadata", f"{PART}/part.json")},
    ),
]


@pytest.mark.parametrize(("damage", "expected"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_named_without_reading_the_arrays(store: Path, damage: Any, expected: Any) -> None:
    damage(store)
    assert problems(store) == expected
    assert problems(store, deep=True) == expected


DEEP: list[tuple[str, Callable[[Path], Any], tuple[str, str], str]] = [
    (
        "nan",
        lambda part: store_value(part, "hidden", np.nan, 6),
        ("non-finite", f"{PART}/hidden/c/0/0"),
        "row 6, of sample 'a1', holds nan or another value that is not finite",
    ),
    (
        "infinity",
        lambda part: store_value(part, "attention/layer_0_scale", np.inf, 9),
        ("non-finite", f"{PART}/attention/layer_0_scale/c/0/0"),
        "row 9, of sample 'a2'",
    ),
    (
        "reserved code",
        lambda part: store_value(part, "vision", -32768, 1),
        ("non-finite", f"{PART}/vision/c/0/0/0"),
        f"row 1, of image {'b' * 64}, holds -32768",
    ),
    (
        "flipped bit",
        lambda part: flip_bit(part / "logits/ids/c/0/0", offset=2),
        ("checksum", f"{PART}/logits/ids/c/0/0"),
        "its blake3 is",
    ),
    (
        "flipped bit hashed anew",
        lambda part: (flip_bit(part / "logits/ids/c/0/0", offset=2), rewrite_record(part)),
        ("checksum", f"{PART}/logits/ids/c/0/0"),
        "chunk 0 cannot be decoded",
    ),
]


@pytest.mark.parametrize(
    ("damage", "expected", "detail"), [row[1:] for row in DEEP], ids=[row[0] for row in DEEP]
)
def test_damaged_values_are_found_deep(
    store: Path, damage: Any, expected: tuple[str, str], detail: str
) -> None:
    damage(store / PART)
    assert problems(store) == set()
    report = verify(store, deep=True)
    assert [(problem.kind, problem.file) for problem in report.problems] == [expected]
    assert detail in report.problems[0].detail and not report.is_sound


def test_stray_and_unreadable_files_are_named_and_are_no_damage_of_a_part(store: Path) -> None:
    (store / PART / ".DS_Store").touch()
    (store / PART / "._vision").touch()
    report = verify(store, deep=True)
    assert report.is_sound and report.num_problems == 0 and len(report.problems) == 2
    (store / PART / "notes").touch()
    (store / "parts/shard-000001/part.json").unlink()
    (store / "parts/shard-000001/part.json").symlink_to("/proc/self/mem")
    report = verify(store, deep=True)
    assert not report.is_sound and report.num_problems == 2 and report.damaged_parts == ()
    (store / PART / "part.json").unlink()
    assert verify(store, deep=True).damaged_parts == ("shard-000000",)


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(store: Path) -> None:
    random = np.random.default_rng(0)
    elsewhere = store / "parts/shard-000001"
    files = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size]
    for file in sorted(path for path in files if elsewhere not in path.parents):
        for _ in range(2):
            offset, bit = int(random.integers(file.stat().st_size)), int(random.integers(8))
            flip_bit(file, offset=offset, bit=bit)
            found = {name for _, name in problems(store, deep=True)}
            assert file.relative_to(store).as_posix() in found, (file, offset, bit)
            flip_bit(file, offset=offset, bit=bit)
    assert problems(store, deep=True) == set()


def test_a_key_in_two_parts_is_a_problem(tmp_path: Path) -> None:
    report = verify(write_clashing_store(tmp_path), deep=False)
    assert [(p.kind, p.file, p.detail) for p in report.problems] == [
        ("metadata", "parts/two/index.json", "key 'k' is also in one")
    ]


def test_a_directory_with_no_name_of_ours_in_parts_is_a_problem(store: Path) -> None:
    shutil.copytree(store / PART, store / "parts/.hidden")
    assert ("unexpected file", "parts/.hidden") in problems(store)


def test_what_is_no_store_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="found neither one nor a directory of parts; write one with"):
        verify(tmp_path, deep=False)
    with pytest.raises(StoreNotFound, match="found nothing"):
        verify(tmp_path / "none", deep=True)
