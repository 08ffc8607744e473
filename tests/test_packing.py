"""Packing: bad input is listed with its reason, the rest becomes shards, and twice gives the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.compat import WebDataset

from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Sample, read_shard
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import PackError
from pipeline.packing.images import read_images
from pipeline.packing.pack import key_of_id, pack


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 50 + shade).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """81 million pixels in about 10 kB."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for number in range(4):
        (folder / "sub" / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
    (folder / "noending").write_bytes(picture(9))
    (folder / "cut.jpg").write_bytes(picture(5, "JPEG")[:-300])
    (folder / "cut.png").write_bytes(picture(5)[:-300])
    (folder / "text.jpg").write_bytes(b"<html>404</html>")
    (folder / "bomb.png").write_bytes(bomb())
    return folder


def entry(identity, image=None, question: str = "Q?", answer: str = "A.", **fields) -> dict:
    count = len(image) if isinstance(image, list) else image is not None
    turns = [{"from": "human", "value": "<image>\n" * count + question}, {"from": "gpt", "value": answer}]
    return {"id": identity, **({} if image is None else {"image": image}), "conversations": turns, **fields}


def write(folder: Path, entries: list, name: str = "data.json") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    lines = [item if isinstance(item, str) else json.dumps(item) for item in entries]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]")
    return path


def samples_of(output: Path) -> list[Sample]:
    found = [sample for path in expand_shards(str(output)) for sample in read_shard(path)]
    assert all(isinstance(sample, Sample) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def rejects_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]


MIXED = [
    entry("b", "sub/1.jpg"),
    entry("a", "sub/0.jpg", source="kept"),
    entry("t"),
    entry("b2", "sub/../sub/1.jpg"),
    entry("pair", ["sub/0.jpg", "noending"]),
    entry(5, "sub/1.jpg"),
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_samples_of_an_image_stand_side_by_side_with_bytes_and_record_untouched(tmp_path, images, name):
    summary = pack(write(tmp_path, MIXED, name), tmp_path / "out", image_folder=images)
    assert (summary.seen, summary.packed, summary.rejected, summary.rejects_by_reason) == (6, 6, 0, {})
    assert summary.shards == ("shard-000000.tar",)
    samples = samples_of(tmp_path / "out")
    assert [sample.key for sample in samples] == ["b", "b2", "5", "a", "pair", "t"]
    assert samples[0].images == ((images / "sub/1.jpg").read_bytes(),)
    assert samples[4].images == ((images / "sub/0.jpg").read_bytes(), (images / "noending").read_bytes())
    assert samples[4].image_spans[1].file == "pair.1.png"
    by_key = {sample.key: {**sample.metadata, "conversations": sample.conversations} for sample in samples}
    assert list(by_key.values()) == [MIXED[n] for n in (0, 3, 5, 1, 4, 2)]
    assert rejects_of(tmp_path / "out") == []


def test_webdataset_itself_reads_a_pack(tmp_path, images):
    pack(write(tmp_path, MIXED[:4]), tmp_path / "out", image_folder=images)
    paths = expand_shards(str(tmp_path / "out"))
    found = list(WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == ["b", "b2", "a", "t"]
    assert found[0]["jpg"] == (images / "sub/1.jpg").read_bytes()


def id_of_key(key: str) -> str:
    """Return the id that `key_of_id` made a key of."""
    return urllib.parse.unquote(key.partition("+")[0])


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_key_gives_its_id_back_and_never_splits(identity):
    key = key_of_id(identity)
    assert id_of_key(key) == identity
    assert key.isascii() and not set("/. ") & set(key)


def test_strange_and_long_ids_survive_the_tar(tmp_path, images):
    ids = ["a/b.c", "..", "Größe %2E", "x" * 300, "0007"]
    pack(write(tmp_path, [entry(i, "sub/0.jpg") for i in ids]), tmp_path / "out", image_folder=images)
    assert [id_of_key(sample.key) for sample in samples_of(tmp_path / "out")] == ids


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_an_image_is_split_over_shards_only_if_it_alone_fills_one(tmp_path_factory, images, numbers, limit):
    folder = tmp_path_factory.mktemp("split")
    entries = [entry(n, f"sub/{image}.jpg") for n, image in enumerate(numbers)]
    summary = pack(write(folder, entries), folder / "out", image_folder=images, samples_per_shard=limit)
    assert summary.packed == len(numbers)
    shards_of_image: dict[str, set[str]] = {}
    for name in summary.shards:
        samples = list(read_shard(folder / "out" / name))
        assert 1 <= len(samples) <= limit
        for sample in samples:
            assert isinstance(sample, Sample)
            shards_of_image.setdefault(sample.metadata["image"], set()).add(name)
    for image, shards in shards_of_image.items():
        count = numbers.count(int(image[4]))
        assert len(shards) == -(-count // limit)


TURNS_OF_0 = entry(0)["conversations"]
REVERSED = {"conversations": TURNS_OF_0[::-1]}
BAD = [
    (entry("x", "sub/none.jpg"), "missing image file: sub/none.jpg"),
    (entry("x", "sub"), "missing image file: sub"),
    (entry("x", "n" * 300), "unreadable image file: nnn"),
    (entry("x", "cut.jpg"), "truncated or damaged image: cut.jpg: OSError: "),
    (entry("x", "cut.png"), "truncated or damaged image: cut.png: OSError: "),
    (entry("x", "text.jpg"), "not an image: text.jpg: 16 bytes"),
    (entry("x", "bomb.png"), "too many pixels: bomb.png: "),
    (entry("x", ["sub/0.jpg", "cut.png"]), "truncated or damaged image: cut.png"),
    ({**entry("x"), "image": "sub/0.jpg"}, "no <image> in the text of an image sample: 1 image(s) given"),
    (entry("x", "sub/0.jpg", "and <image>"), "number of <image> differs from number of images: 2 and 1"),
    (entry("x", None, "<image> Q?"), "<image> in the text, but no image: 1 asked for"),
    ({"id": "x", "conversations": []}, "empty conversations"),
    ({"id": "x"}, "no conversations"),
    (entry(True), "id is no text: found True"),
    (entry(["a"]), "id is no text: found ['a']"),
    (entry("\ud800"), "id is no text: it is not valid Unicode"),
    (entry("x", "../secret.jpg"), "image path leaves the image folder: ../secret.jpg"),
    (entry("x", "/etc/passwd"), "image path leaves the image folder: /etc/passwd"),
    (entry("x", "sub/../../y.jpg"), "image path leaves the image folder: ../y.jpg"),
    (entry("x", 3), "image is no path: 3"),
    (entry("x", ["sub/0.jpg", None]), "image is no path: None"),
    (entry("x", "\ud800.jpg"), "image is no path: '\\ud800.jpg'"),
    (entry("x", "/\ud800.jpg"), "image is no path: "),
    ({**entry("x"), "images": ["a.jpg"]}, "no <image> in the text of an image sample: 1 image(s) given"),
    ({**entry("x", question="<image> Q?"), "images": ["a.jpg"]}, "missing image file: a.jpg"),
    (
        entry("x", "https://host/a.jpg"),
        "image behind a URL: https://host/a.jpg; download it, and name its path",
    ),
    (entry("x", "data:image/png;base64,!"), "image is no path: data:image/png;base64,!: "),
    ({**entry("x"), "Image": "a.jpg"}, "media without a placeholder: Image: 'a.jpg'; name images in `image`"),
    ({**entry("x"), "image_path": "a.jpg"}, "media without a placeholder: image_path: 'a.jpg'; "),
    ({**entry("x"), "imgUrls": {"0": "http"}}, "media without a placeholder: imgUrls: {'0': 'http'}; "),
    (
        {**entry("x"), "video": "a.mp4"},
        "media without a placeholder: video: 'a.mp4'; only images can be read",
    ),
    (
        {**entry("x", "sub/0.jpg"), "videos": ["a.mp4"]},
        "media without a placeholder: videos: ['a.mp4']; only",
    ),
    ({**entry("x"), "audio-file": "a.wav"}, "media without a placeholder: audio-file: 'a.wav'; only"),
    ({**entry("x", "sub/0.jpg"), "images": ["a", "b"]}, "media without a placeholder: images: ['a', 'b']; "),
    (
        {"id": "x", "conversations": [{**TURNS_OF_0[0], "image": "a"}, TURNS_OF_0[1]]},
        "media without a placeholder: image: 'a'; ",
    ),
    (entry("x", None, answer="\udfff"), "text is not valid Unicode: turn 2"),
    ({"id": "x", **REVERSED}, "no answer: the last turn is human's"),
    ({"id": "x", "conversations": [entry(0)["conversations"][0]] * 2}, "wrong role order"),
    (
        {"id": "x", "conversations": [*entry(0)["conversations"], entry(0)["conversations"][1]]},
        "wrong role order",
    ),
    ({"id": "x", "conversations": [{"from": "tool", "value": "Q"}]}, "unknown role: turn 1 is from 'tool'"),
    ({"id": "x", "conversations": ["Q", "A"]}, "malformed turn: turn 1"),
    (["a list"], "JSON is no object: list"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason[:50] for _, reason in BAD])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_bad_entry_is_listed_with_its_reason_and_stops_nothing(tmp_path, images, bad, reason, name):
    path = write(tmp_path, [entry("ok", "sub/0.jpg"), bad, entry("also", "sub/0.jpg")], name)
    summary = pack(path, tmp_path / "out", image_folder=images)
    assert [sample.key for sample in samples_of(tmp_path / "out")] == ["ok", "also"]
    (row,) = rejects_of(tmp_path / "out")
    assert row["line"] == 2
    assert row["reason"].startswith(reason)
    assert (summary.seen, summary.packed, summary.rejected) == (3, 2, 1)
    assert summary.rejects_by_reason == {reason.split(":")[0]: 1}


def test_rejects_name_the_id_where_there_is_one(tmp_path, images):
    path = write(
        tmp_path, [entry(7, "sub/none.jpg"), {"id": "empty", "conversations": []}, "{broken"], "data.jsonl"
    )
    pack(path, tmp_path / "out", image_folder=images)
    assert [row["id"] for row in rejects_of(tmp_path / "out")] == ["7", "empty", None]


def test_a_broken_jsonl_line_is_one_bad_entry(tmp_path, images):
    path = write(tmp_path, [entry("a"), "", '{"id": 1,', entry("b")], "data.jsonl")
    path.write_bytes(path.read_bytes() + b'\n{"id": "\xff"}\n')
    summary = pack(path, tmp_path / "out", image_folder=images)
    assert [(row["line"], row["reason"][:11]) for row in rejects_of(tmp_path / "out")] == [
        (3, "broken JSON"),
        (5, "broken JSON"),
    ]
    assert summary.rejects_by_reason == {"broken JSON": 2}
    assert summary.packed == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            b'[{"id": 1},\n {"id": }]',
            r"data.json is not valid JSON: Expecting value at line 2, column 9; correct it",
        ),
        (b"", r"data.json is not valid JSON: Expecting value at line 1, column 1"),
        (gzip.compress(b"[]", mtime=0), r"data.json is compressed, which is not read; unpack it first"),
        ("[]".encode("utf-16"), r"data.json is UTF-16, which is not read; save it as UTF-8"),
        (
            b'{"images": [], "annotations": []}',
            "found dict with the keys images, annotations; .* save that list alone",
        ),
        (b'["\xff"]', r"data.json is not valid JSON: .*; save it as UTF-8"),
        (b'{"id": 1}', r"data.json must be a JSON list of entries, found dict with the keys id; wrap"),
    ],
)
def test_an_unreadable_json_file_is_refused_with_the_place(tmp_path, images, text, complaint):
    (tmp_path / "data.json").write_bytes(text)
    with pytest.raises(PackError, match=complaint):
        pack(tmp_path / "data.json", tmp_path / "out", image_folder=images)


def test_shards_inside_the_annotations_would_change_them(tmp_path):
    with pytest.raises(
        PackError, match=r"out lies in the folder of the annotations, and would change it; name"
    ):
        pack(tmp_path, tmp_path / "out")


def test_images_of_a_group_that_are_too_large_for_memory_are_read_in_parts(tmp_path, images, monkeypatch):
    """A thousand entries may share their first image and differ in the others."""
    entries = [entry(n, ["sub/0.jpg", f"sub/{n % 3 + 1}.jpg"]) for n in range(30)]
    path = write(tmp_path, [*entries, entry("cut", ["sub/0.jpg", "cut.jpg"])])
    pack(path, tmp_path / "whole", image_folder=images)
    most = 0

    def read(wanted: list, *rest: Any):
        nonlocal most
        most = max(most, len(wanted))
        return read_images(wanted, *rest)

    monkeypatch.setattr("pipeline.packing.pack.read_images", read)
    monkeypatch.setattr("pipeline.packing.pack.MAX_BYTES", 3000)
    monkeypatch.setattr("pipeline.packing.worklist.MAX_BYTES", 500)
    summary = pack(path, tmp_path / "parts", image_folder=images)
    assert (summary.seen, summary.packed, summary.rejected) == (31, 30, 1)
    assert most == 2  # images at once
    names = ("shard-000000.tar", "rejects.jsonl")
    assert [(tmp_path / "parts" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


@pytest.mark.parametrize("bad", [entry("x", "sub/none.jpg"), {"id": "x", "conversations": []}])
def test_fail_lists_the_bad_entry_and_stops(tmp_path, images, bad):
    path = write(tmp_path, [entry("ok"), bad])
    with pytest.raises(
        PackError, match=r"1 bad sample\(s\), first entry 2 \(id x\): .*set on_bad_sample to reject"
    ):
        pack(path, tmp_path / "out", image_folder=images, on_bad_sample="fail")
    assert [row["line"] for row in rejects_of(tmp_path / "out")] == [2]
    assert not (tmp_path / "out" / "pack.json").exists()
    write(tmp_path, [entry("ok")])
    assert pack(path, tmp_path / "out", image_folder=images, on_bad_sample="fail").packed == 1


def test_packing_twice_gives_identical_shards(tmp_path, images):
    path = write(tmp_path, MIXED)
    one = pack(path, tmp_path / "one", image_folder=images, samples_per_shard=2)
    two = pack(path, tmp_path / "two", image_folder=images, samples_per_shard=2)
    assert one == two and len(one.shards) == 4
    for name in one.shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_finished_pack_is_left_as_it_is(tmp_path, images):
    path = write(tmp_path, [*MIXED, entry("x", "sub/none.jpg")])
    first = pack(path, tmp_path / "out", image_folder=images)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert set(before) == {
        "shard-000000.tar", "rejects.jsonl", "pack.json", "pack.images.jsonl", "pack.rejects.1.jsonl",
    }  # fmt: skip
    assert pack(path, tmp_path / "out", image_folder=images) == first
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_a_pack_of_other_input_is_never_overwritten(tmp_path, images):
    path = write(tmp_path, MIXED)
    pack(path, tmp_path / "out", image_folder=images)
    with pytest.raises(
        PackError, match=r"holds a pack of other input: samples_per_shard was 1000, now 3; name another"
    ):
        pack(path, tmp_path / "out", image_folder=images, samples_per_shard=3)
    write(tmp_path, MIXED[:2])
    with pytest.raises(
        PackError,
        match=r"holds a pack of other input: annotations was .*; name another output, or .* --again",
    ):
        pack(path, tmp_path / "out", image_folder=images)


def test_a_pack_that_lost_a_shard_is_not_taken_for_finished(tmp_path, images):
    path = write(tmp_path, MIXED)
    pack(path, tmp_path / "out", image_folder=images)
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(
        PackError, match=r"shard-000000.tar is missing or not \d+ bytes, as pack.json says; restore it"
    ):
        pack(path, tmp_path / "out", image_folder=images)
    (tmp_path / "out" / "pack.json").write_text("{}")
    with pytest.raises(PackError, match=r"pack.json cannot be read .*; name another output, or .* --again"):
        pack(path, tmp_path / "out", image_folder=images)


def test_an_interrupted_pack_is_begun_anew(tmp_path, images):
    path = write(tmp_path, MIXED)

    def interrupt(done: int, total: int | None) -> None:
        assert total in (None, 6)  # None while the entries are read
        if total and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(path, tmp_path / "out", image_folder=images, samples_per_shard=1, progress=interrupt)
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"pack.unfinished.json", "shard-000000.tar", "shard-000004.tar.part"} <= left
    pack(path, tmp_path / "out", image_folder=images)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "shard-000000.tar",
        "rejects.jsonl",
        "pack.json",
        "pack.images.jsonl",
        "pack.rejects.1.jsonl",
    }
    assert len(samples_of(tmp_path / "out")) == 6


def test_shards_of_others_are_never_removed(tmp_path, images):
    path = write(tmp_path, MIXED)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(PackError, match=r"already holds shard-000000.tar, which is of no pack known here"):
        pack(path, tmp_path / "out", image_folder=images)
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == b"mine"


def test_wrong_settings_are_named(tmp_path, images):
    path = write(tmp_path, MIXED)
    with pytest.raises(PackError, match=r"No annotations at .*none.json"):
        pack(tmp_path / "none.json", tmp_path / "out", image_folder=images)
    with pytest.raises(PackError, match=r"No image folder at .*nowhere"):
        pack(path, tmp_path / "out", image_folder=tmp_path / "nowhere")
    with pytest.raises(PackError, match="samples_per_shard must be at least 1, found 0"):
        pack(path, tmp_path / "out", image_folder=images, samples_per_shard=0)
    with pytest.raises(PackError, match="on_bad_sample: unknown value 'skip'; known are reject, fail"):
        pack(path, tmp_path / "out", image_folder=images, on_bad_sample="skip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(PackError, match=r"data.json is a file; name a folder"):
        pack(path, path, image_folder=images)


def test_an_image_too_large_as_a_file_is_not_read(tmp_path):
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)  # takes no space on the disk
    pack(write(tmp_path, [entry("x", "large.jpg")]), tmp_path / "out", image_folder=tmp_path)
    assert rejects_of(tmp_path / "out")[0]["reason"].startswith("image file too large: large.jpg, ")


def test_an_empty_file_packs_to_nothing(tmp_path, images):
    summary = pack(write(tmp_path, [], "data.jsonl"), tmp_path / "out", image_folder=images)
    assert (summary.seen, summary.shards) == (0, ())


@pytest.mark.parametrize("name", ["a.mpo", "a", "a.png", "a.JPG", "a.jfif"])
def test_a_photograph_with_a_second_one_behind_it_is_packed_as_jpeg(tmp_path, images, name):
    file = io.BytesIO()
    views = [Image.effect_noise((40, 30), shade) for shade in (50, 90)]
    views[0].save(file, "MPO", save_all=True, append_images=views[1:])
    (tmp_path / name).write_bytes(file.getvalue())
    path = write(tmp_path, [entry("x", name)], "data.jsonl")
    assert pack(path, tmp_path / "out", image_folder=tmp_path).packed == 1
    (sample,) = samples_of(tmp_path / "out")
    assert sample.image_spans[0].file == "x.jpg" and sample.images == (file.getvalue(),)


def test_a_member_is_named_by_what_it_holds_not_by_a_wrong_ending(tmp_path, images):
    (tmp_path / "wrong.png").write_bytes(picture(1, "JPEG"))
    (tmp_path / "right.jpeg").write_bytes(picture(2, "JPEG"))
    path = write(tmp_path, [entry("a", "wrong.png"), entry("b", "right.jpeg")])
    pack(path, tmp_path / "out", image_folder=tmp_path)
    assert [s.image_spans[0].file for s in samples_of(tmp_path / "out")] == ["a.jpg", "b.jpeg"]


def test_json_of_any_depth_is_packed_or_rejected(tmp_path, images):
    deep = [f'{{"id": "{n}", "x": {"[" * n}{"]" * n}, {json.dumps(entry(n))[1:]}' for n in range(900, 1010)]
    summary = pack(write(tmp_path, deep, "data.jsonl"), tmp_path / "out", image_folder=images)
    assert summary.seen == 110 and 0 < summary.packed < 110
