"""Annotations as labs have them: ids that repeat or lack, absolute paths, accents, media that nothing stands for."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from test_packing import entry, id_of_key, rejects_of, samples_of, write

from pipeline.errors import PackError
from pipeline.packing.annotations import Record, read_annotations
from pipeline.packing.pack import pack
from pipeline.packing.sources import open_source

COMPOSED = unicodedata.normalize("NFC", "Größe é.png")
APART = unicodedata.normalize("NFD", COMPOSED)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.effect_noise((8, 6), 50).save(folder / name)
    return folder


def keys(output: Path) -> list[str]:
    return [sample.key for sample in samples_of(output)]


# Ids


@pytest.mark.parametrize("samples_per_shard", [1, 2, 1000])
def test_conversations_that_share_an_id_are_all_packed_and_keep_it(tmp_path, images, samples_per_shard):
    entries = [
        entry("a", "0.png"),
        entry("b"),
        entry("a", "0.png", "Q2?"),
        entry("a", "1.png"),
        entry(1),
        entry("1"),
    ]
    out = tmp_path / "out"
    pack(write(tmp_path, entries), out, image_folder=images, samples_per_shard=samples_per_shard)
    assert keys(out) == ["a", "a+2", "b", "a+3", "1", "1+2"]
    assert [id_of_key(key) for key in keys(out)] == ["a", "a", "b", "a", "1", "1"]
    assert [sample.metadata["id"] for sample in samples_of(out)] == ["a", "a", "b", "a", 1, "1"]


def test_an_id_that_looks_like_a_repeat_is_another_key(tmp_path, images):
    entries = [entry("a"), entry("a+2"), entry("a")]
    pack(write(tmp_path, entries), tmp_path / "out", image_folder=images)
    assert keys(tmp_path / "out") == ["a", "a%2B2", "a+2"]


def test_a_bad_entry_takes_no_others_key_so_repairing_it_changes_none(tmp_path, images):
    entries = [entry("a", "late.png"), entry("a", "0.png"), {"id": "a"}, entry("a")]
    path = write(tmp_path, entries)
    pack(path, tmp_path / "one", image_folder=images)
    (images / "late.png").write_bytes((images / "1.png").read_bytes())
    pack(path, tmp_path / "two", image_folder=images)
    assert keys(tmp_path / "one") == ["a+2", "a+4"]
    assert keys(tmp_path / "two") == ["a", "a+2", "a+4"]


@pytest.mark.parametrize("name", ["train.v2.json", "train.v2.jsonl"])
def test_an_entry_without_id_gets_one_of_file_and_line(tmp_path, images, name):
    without = {"conversations": entry(0)["conversations"]}
    entries = [without, {**without, "id": None}, {**without, "id": ""}, entry("train.v2-1"), entry(1.5), {}]
    pack(write(tmp_path, entries, name), tmp_path / "out", image_folder=images)
    assert [id_of_key(key) for key in keys(tmp_path / "out")] == [
        "train.v2-1", "train.v2-2", "train.v2-3", "train.v2-1", "1.5",
    ]  # fmt: skip
    assert len(set(keys(tmp_path / "out"))) == 5
    [row] = rejects_of(tmp_path / "out")
    assert row["id"] == "train.v2-6" and row["reason"].startswith(
        "no conversations: found nothing; known are"
    )
    assert "id" not in samples_of(tmp_path / "out")[0].metadata


# Images


@pytest.mark.parametrize("value", ["", [], None, [None], ["", None]])
def test_an_image_that_is_none_is_text_alone_if_the_text_asks_for_none(tmp_path, images, value):
    asking = {**entry("asks", question="<image> Q?"), "image": value}
    pack(write(tmp_path, [{**entry("a"), "image": value}, asking]), tmp_path / "out", image_folder=images)
    assert [sample.images for sample in samples_of(tmp_path / "out")] == [()]
    assert [row["reason"] for row in rejects_of(tmp_path / "out")] == [
        "<image> in the text, but no image: 1 asked for"
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"image_id": "7", "image_size": [8, 6], "num_images": 1, "video_name": "a.mp4"},
        {"images": ["elsewhere/0.png"], "image_path": "/elsewhere/0.png", "image_urls": ["a", "b"]},
        {"video": None, "videos": [], "audio": "", "audios": [None], "video_path": {}},
    ],
)
def test_keys_that_name_no_other_media_are_kept_with_the_sample(tmp_path, images, fields):
    pack(write(tmp_path, [entry("a", "0.png", **fields)]), tmp_path / "out", image_folder=images)
    (sample,) = samples_of(tmp_path / "out")
    assert {name: sample.metadata[name] for name in fields} == fields


def test_absolute_paths_inside_the_image_folder_are_those_inside_it(tmp_path, images, monkeypatch):
    (tmp_path / "link").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    entries = [
        entry("a", f"{images}/0.png"),
        entry("b", f"{tmp_path}/link/0.png"),
        entry("c", f"{images}/../images/0.png"),
        entry("d", f"{images}2/0.png"),
        entry("e", f"{images}/../0.png"),
        entry("f", f"{images}"),
    ]
    for folder in (images, Path("images"), tmp_path / "link", Path("link")):
        found = list(read_annotations(open_source(write(tmp_path, entries)), folder, lambda _: 1))
        assert [record.images for record in found if isinstance(record, Record)] == [("0.png",)] * 3
        assert [isinstance(record, Record) for record in found] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("stored", "named"), [(APART, COMPOSED), (COMPOSED, APART), (APART, APART)])
def test_names_with_accents_are_found_in_either_form(tmp_path, images, stored, named):
    folder = images / stored.removesuffix(".png")
    folder.mkdir()
    (folder / stored).write_bytes((images / "0.png").read_bytes())
    path = write(tmp_path, [entry("a", f"{named.removesuffix('.png')}/{named}")])
    assert pack(path, tmp_path / "out", image_folder=images).packed == 1


def test_of_two_files_that_differ_in_form_alone_each_is_itself(tmp_path, images):
    for name, source in ((APART, "0.png"), (COMPOSED, "1.png")):
        (images / name).write_bytes((images / source).read_bytes())
    if len(os.listdir(images)) < 4:
        pytest.skip("this disk takes both for one name")
    pack(write(tmp_path, [entry("a", APART), entry("b", COMPOSED)]), tmp_path / "out", image_folder=images)
    assert [sample.images[0] for sample in samples_of(tmp_path / "out")] == [
        (images / "0.png").read_bytes(),
        (images / "1.png").read_bytes(),
    ]


# Files


def test_a_tilde_is_the_home_folder(tmp_path, images, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, [entry("a", "0.png")])
    pack(Path("~/data.json"), Path("~/out"), image_folder=Path("~/images"))
    assert keys(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_list_by_the_name_of_lines_is_refused_once(tmp_path, images, indent, mark):
    file = tmp_path / "data.jsonl"
    file.write_bytes(mark + b"\n" + json.dumps([entry("a"), entry("b")], indent=indent).encode())
    with pytest.raises(
        PackError, match=r"data.jsonl holds one JSON list, not an entry a line; name it .json"
    ):
        pack(file, tmp_path / "out", image_folder=images)
    assert not (tmp_path / "out" / "pack.json").exists()


def test_a_list_among_lines_is_one_bad_entry(tmp_path, images):
    path = write(tmp_path, [[1], entry("a")], "data.jsonl")
    assert pack(path, tmp_path / "out", image_folder=images).rejects_by_reason == {"JSON is no object": 1}


@pytest.mark.parametrize("name", ["id", "image", "images", "conversations"])
def test_values_nested_as_deep_as_json_goes_are_rejected(tmp_path, images, name):
    deep = [f'{{"id": "a", "conversations": [], "{name}": {"[" * n}{"]" * n}}}' for n in range(900, 1000)]
    summary = pack(write(tmp_path, deep, "data.jsonl"), tmp_path / "out", image_folder=images)
    assert (summary.seen, summary.packed) == (100, 0)
