"""Shards and members by the names they have in practice: made on a Mac, with dots, brackets and accents."""

from __future__ import annotations

import unicodedata

import pytest
from small_experiment import write_shard
from test_shards import TEXT_TURNS, TURNS, picture, read_members, record

from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Rejected, Sample
from pipeline.errors import ShardError

PAIR = (("json", record()), ("png", picture()))
APPLE_DOUBLE = b"\x00\x05\x16\x07" + bytes(80)


def pair(name: str) -> list[tuple[str, bytes]]:
    return [(f"{name}.{ending}", data) for ending, data in PAIR]


def keys(results: list[Sample | Rejected]) -> tuple[list[str], list[str]]:
    """Keys of the samples, keys of what was rejected."""
    accepted = [result.key for result in results if isinstance(result, Sample)]
    return accepted, [result.key for result in results if isinstance(result, Rejected)]


# Media


@pytest.mark.parametrize(
    ("fields", "members", "reason"),
    [
        ({"images": ["a.jpg"]}, [], "media without a placeholder: images: ['a.jpg']; name images in `image`"),
        ({"image": "a.jpg"}, [], "media without a placeholder: image: 'a.jpg'"),
        ({"video": "a.mp4"}, [], "media without a placeholder: video: 'a.mp4'; only images can be read"),
        ({"video": "a.mp4"}, [("k.png", picture())], "media without a placeholder: video: 'a.mp4'; only"),
    ],
)
def test_media_that_a_samples_json_names_and_its_text_does_not_are_rejected(
    tmp_path, fields, members, reason
):
    turns = TURNS if members else TEXT_TURNS
    (rejected,) = read_members(tmp_path, ("k.json", record(turns, **fields)), *members)
    assert isinstance(rejected, Rejected) and rejected.reason.startswith(reason)


def test_keys_that_say_where_a_samples_image_was_are_kept(tmp_path):
    fields = {"image": "a.jpg", "images": ["b.jpg"], "image_path": "c.jpg"}
    (sample,) = read_members(tmp_path, ("k.json", record(**fields)), ("k.png", picture()))
    assert isinstance(sample, Sample) and sample.metadata == fields


# What lies beside files


@pytest.mark.parametrize("folder", ["", "mydata/", "./mydata/", "a.b/c/"])
def test_what_file_managers_leave_is_no_member(tmp_path, folder):
    members: list[tuple[str, bytes]] = []
    for name in ("001", "002"):
        for file, data in pair(name):
            members += [(f"{folder}._{file}", APPLE_DOUBLE), (f"{folder}{file}", data)]
    litter = (
        ".DS_Store",
        ".nfs0001",
        "Thumbs.db",
        "desktop.ini",
        "__MACOSX/._001.json",
        "__MACOSX/x/001.json",
    )
    members += [(f"{folder}{name}", APPLE_DOUBLE) for name in litter]
    assert keys(read_members(tmp_path, *members)) == ([f"{folder}001", f"{folder}002"], [])


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/*"])
def test_a_file_beside_a_shard_is_no_shard(tmp_path, pattern):
    shard = write_shard(tmp_path / "a.tar", pair("k"))
    (tmp_path / "._a.tar").write_bytes(APPLE_DOUBLE)
    assert expand_shards(f"{tmp_path}{pattern}") == [str(shard)]


# Dots


def test_samples_with_dots_in_their_names_are_rejected_one_by_one_with_what_to_rename(tmp_path):
    results = read_members(
        tmp_path, *pair("good"), *pair("scan_1.5"), *pair("scan_1.6"), *pair("x/scan_2.5.b"), *pair("last")
    )
    assert keys(results) == (["good", "last"], ["scan_1.5", "scan_1.6", "x/scan_2.5.b"])
    reasons = [result.reason for result in results if isinstance(result, Rejected)]
    assert reasons[0] == (
        "dots in the name: WebDataset reads scan_1.5.json as the key scan_1 with the ending 5.json; "
        "rename it to scan_1_5.json, and what belongs to it likewise"
    )
    assert "rename it to x/scan_2_5_b.json" in reasons[2]


def test_a_better_name_drops_the_ending_however_it_is_written(tmp_path):
    [(name, data), *_] = pair("scan_1.5")
    [rejected] = read_members(tmp_path, (name.replace(".json", ".JSON"), data))
    assert isinstance(rejected, Rejected) and "rename it to scan_1_5.json" in rejected.reason


def test_a_name_with_dots_costs_no_other_sample(tmp_path):
    several = record([{**TEXT_TURNS[0], "value": "<image><image>?"}, TEXT_TURNS[1]])
    members = [("s.7.json", several), ("s.7.0.png", picture()), ("s.7.1.png", picture())]
    results = read_members(tmp_path, *pair("s"), *pair("s.5"), *pair("s.5.6"), *members)
    assert keys(results) == (["s"], ["s.5", "s.5.6", "s.7"])


def test_text_with_dots_in_its_name_is_not_dropped_beside_another(tmp_path):
    results = read_members(
        tmp_path, *((f"{name}.json", record(TEXT_TURNS)) for name in ("s", "s.5", "t", "s.6"))
    )
    assert keys(results) == (["s", "t"], ["s.5", "s.6"])


def test_other_members_of_a_sample_stay_its_own(tmp_path):
    extras = [
        ("s.meta.json", b'{"source": 1}'),
        ("s.mask.png", picture()),
        ("s.mask.json", b"{}"),
        ("s.x.json", b"{"),
    ]
    (sample,) = read_members(tmp_path, *pair("s"), *extras)
    assert isinstance(sample, Sample) and sample.images == (picture(),)


def test_an_image_with_dots_and_without_json_says_where_its_ending_begins(tmp_path):
    (rejected,) = read_members(tmp_path, ("scan_1.5.png", picture()))
    assert rejected == Rejected(
        "scan_1", "no JSON file: found 5.png; the ending of scan_1.5.png begins at its first dot"
    )


# Accents


def test_members_whose_names_differ_in_how_accents_are_stored_are_one_sample(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    (sample,) = read_members(tmp_path, (f"{apart}.json", PAIR[0][1]), (f"{composed}.png", PAIR[1][1]))
    assert isinstance(sample, Sample) and sample.key == apart


def test_a_folder_of_shards_is_found_in_either_form(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    (tmp_path / apart).mkdir()
    shard = str(write_shard(tmp_path / apart / "a-0.tar", []))
    for pattern in ("", "/a-0.tar", "/*.tar", "/a-{0..0}.tar"):
        assert expand_shards(f"{tmp_path}/{composed}{pattern}") == [shard]


# Brackets, braces, home


@pytest.mark.parametrize("folder", ["set [v1]", "{a,b}", "run*", "a{b", "[x]/[y]"])
def test_brackets_and_braces_of_a_folder_that_is_there_are_letters(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    shards = [str(write_shard(tmp_path / folder / f"s-{n}.tar", [])) for n in range(2)]
    for pattern in ("", "/*.tar", "/s-[01].tar", "/s-{0..1}.tar", "/**/s-?.tar"):
        assert expand_shards(f"{tmp_path}/{folder}{pattern}") == shards
    assert expand_shards(f"{tmp_path}/{folder}/s-1.tar") == shards[1:]


@pytest.mark.parametrize("name", ["a[1].tar", "a{1,2}.tar", "a*.tar"])
def test_a_shard_whose_name_would_be_a_pattern_is_itself(tmp_path, name):
    for file in (name, "a1.tar"):
        write_shard(tmp_path / file, [])
    assert expand_shards(str(tmp_path / name)) == [str(tmp_path / name)]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").mkdir()
    shard = str(write_shard(tmp_path / "shards" / "a.tar", []))
    for pattern in ("~/shards", "~/shards/*.tar", "~/shards/{a,a}.tar", "~/shards/a.tar"):
        assert expand_shards(pattern) == [shard]
    with pytest.raises(ShardError, match=f"there is no folder {tmp_path}/none"):
        expand_shards("~/none/*.tar")


def test_relative_patterns_stay_relative(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tar", [])
    monkeypatch.chdir(tmp_path)
    assert expand_shards("*.tar") == expand_shards("./a.tar") == expand_shards(".") == ["a.tar"]
