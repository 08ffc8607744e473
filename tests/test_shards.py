"""Shards: what is found, accepted and rejected, and that no tar is read in part without a word."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_experiment import write_shard

from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Rejected, Sample, read_shard
from pipeline.data.spans import read_span
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import ShardError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
TEXT_TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


def picture(shade: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def record(turns: list | None = None, **fields) -> bytes:
    return json.dumps({"conversations": TURNS if turns is None else turns, **fields}).encode()


def read_members(tmp_path: Path, *members: tuple[str, bytes]) -> list[Sample | Rejected]:
    return list(read_shard(write_shard(tmp_path / "a.tar", list(members))))


# Finding shards


def test_folders_globs_braces_and_lists_name_shards(tmp_path):
    paths = [str(write_shard(tmp_path / f"shard-{n:06d}.tar", [])) for n in range(4)]
    (tmp_path / "pack.json").write_text("{}")
    assert expand_shards(str(tmp_path)) == paths
    assert expand_shards(f"{tmp_path}/shard-*.tar") == paths
    assert expand_shards(f"{tmp_path}/shard-{{000000..000003}}.tar") == paths
    assert expand_shards([paths[2], f"{tmp_path}/shard-00000{{0,2}}.tar"]) == [paths[0], paths[2]]


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    write_shard(tmp_path / "s-0.tar", [])
    with pytest.raises(
        ShardError, match=r"names 3 shards, 2 of them missing, first .*s-1.tar; correct the range"
    ):
        expand_shards(f"{tmp_path}/s-{{0..2}}.tar")


def test_a_pattern_that_names_nothing_says_what_is_there(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    for pattern in (f"{tmp_path}", f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"):
        with pytest.raises(
            ShardError, match=r"holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more; correct the path"
        ):
            expand_shards(pattern)
    with pytest.raises(ShardError, match=r"there is no folder .*nowhere; correct the path"):
        expand_shards(f"{tmp_path}/nowhere/*.tar")


def test_two_shards_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "s.tar", [])
    with pytest.raises(ShardError, match=r"Two shards have one name, s: .*a/s.tar and .*b/s.tar; rename one"):
        expand_shards(f"{tmp_path}/*/s.tar")


def test_other_unusable_patterns_are_named(tmp_path):
    with pytest.raises(
        ShardError, match=r"gopher://x/a.tar cannot be reached .*give a local path or an s3://"
    ):
        expand_shards("gopher://x/a.tar")
    with pytest.raises(ShardError, match=r"write ranges as \{000000..000009\}"):
        expand_shards(f"{tmp_path}/a-{{0..2.tar")
    with pytest.raises(ShardError, match="No shards are named"):
        expand_shards([])


# What is accepted


def test_a_sample_has_its_images_digests_spans_and_metadata(tmp_path):
    path = write_shard(
        tmp_path / "a.tar", [("k.jpg", picture(9, "JPEG")), ("k.json", record(id=7, source="x"))]
    )
    (sample,) = read_shard(path)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.conversations, sample.metadata) == ("k", TURNS, {"id": 7, "source": "x"})
    assert sample.images == (picture(9, "JPEG"),)
    assert sample.image_digests == (blake3(picture(9, "JPEG")).hexdigest(),)
    assert (sample.image_spans[0].file, sample.json_span.file) == ("k.jpg", "k.json")
    assert read_span(path, sample.image_spans[0]) == sample.images[0]
    assert read_span(path, sample.json_span) == record(id=7, source="x")


def test_text_only_and_several_images_are_samples_too(tmp_path):
    turns = [{"from": "human", "value": "<image><image>\nWhich?"}, {"from": "gpt", "value": "One."}]
    text, pair = read_members(
        tmp_path,
        ("text.json", record(TEXT_TURNS)),
        ("pair.1.PNG", picture(1)),
        ("pair.json", record(turns)),
        ("pair.0.jpg", picture(0, "JPEG")),
    )
    assert isinstance(text, Sample) and text.images == ()
    assert isinstance(pair, Sample) and pair.images == (picture(0, "JPEG"), picture(1))


@pytest.mark.parametrize("ending", ["jfif", "mpo", "MPO", "0.jfif"])
def test_other_names_of_jpeg_are_images(tmp_path, ending):
    image = picture(kind="JPEG")
    (sample,) = read_members(tmp_path, ("a.json", record()), (f"a.{ending}", image))
    assert isinstance(sample, Sample) and sample.images == (image,)


def test_names_follow_webdatasets_rule(tmp_path):
    samples = read_members(
        tmp_path,
        ("README", b"no ending"),
        ("__meta__/x.json", b"skipped"),
        ("a/b/k.json", record()),
        ("a/b/k.png", picture()),
        ("a/b/k.mask.png", picture(3)),
        ("a/b/k.cls", b"5"),
        ("other/k.json", record(TEXT_TURNS)),
    )
    assert [sample.key for sample in samples] == ["a/b/k", "other/k"]
    assert isinstance(samples[0], Sample) and samples[0].images == (picture(),)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_gives_the_true_places(tmp_path, form):
    name = "k" * (90 if form == tarfile.USTAR_FORMAT else 150)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for ending, data in ((".png", picture(4)), (".json", record())):
            info = tarfile.TarInfo(name + ending)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (sample,) = read_shard(tmp_path / "a.tar")
    assert isinstance(sample, Sample) and sample.key == name
    assert read_span(tmp_path / "a.tar", sample.image_spans[0]) == picture(4)


# What is rejected


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.jpg", picture())], "no JSON file: found jpg"),
        ([("k.json", b"{"), ("k.jpg", picture())], "broken JSON: "),
        ([("k.json", b"\xff\xfe\xfa")], "broken JSON: "),
        ([("k.json", b"[" * 100_000)], "broken JSON: "),
        ([("k.json", b"[1]")], "JSON is no object: list"),
        ([("k.json", b"{}")], "no conversations"),
        ([("k.json", record([]))], "empty conversations"),
        ([("k.json", record(TURNS[::-1])), ("k.jpg", picture())], "no answer: the last turn is human's"),
        ([("k.json", record())], "<image> in the text, but no image: 1 asked for"),
        ([("k.json", record(TEXT_TURNS)), ("k.jpg", picture())], "no <image> in the text of an image sample"),
        ([("k.json", record()), ("k.jpg", b"what")], "not an image: 4 bytes"),
        (
            [("k.json", record()), ("k.jpg", picture()), ("k.png", picture())],
            "several images without an order",
        ),
        ([("k.json", record()), ("k.1.png", picture())], "images not numbered 0, 1, ...: found 1"),
        ([("k.json", record()), ("k.0.png", b""), ("k.00.png", b"")], "two images have one number: k.00.png"),
        ([("k.json", record()), ("k.json", record())], "file occurs twice in a sample: k.json"),
    ],
)
def test_a_bad_sample_is_rejected_with_its_reason_and_the_next_is_read(tmp_path, members, reason):
    bad, good = read_members(tmp_path, *members, ("good.json", record(TEXT_TURNS)))
    assert isinstance(bad, Rejected) and bad.key == "k"
    assert bad.reason.startswith(reason)
    assert isinstance(good, Sample) and good.key == "good"


def test_a_bomb_is_rejected_by_its_header(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("k.json", record()), ("k.png", picture())])
    (rejected,) = read_shard(path, max_pixels=23)
    assert rejected == Rejected("k", "too many pixels: 6 x 4; the limit is 23")


def test_a_key_that_comes_back_is_rejected(tmp_path):
    results = read_members(tmp_path, *[(f"{key}.json", record(TEXT_TURNS)) for key in "aba"])
    assert [isinstance(result, Sample) for result in results] == [True, True, False]
    assert results[2] == Rejected("a", "key occurs twice in this shard: its members must be side by side")


def test_a_linked_or_sparse_member_is_no_image(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("k.json")
        info.size = len(record())
        tar.addfile(info, io.BytesIO(record()))
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
    assert list(read_shard(tmp_path / "a.tar")) == [
        Rejected("k", "<image> in the text, but no image: 1 asked for")
    ]


def test_a_huge_member_is_not_read(tmp_path):
    header = tarfile.TarInfo("k.json")
    header.size = MAX_MEMBER_BYTES + 512
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header.tobuf())
        file.truncate(512 + header.size + 1024)  # zeros that take no space on the disk
    (rejected,) = read_shard(tmp_path / "a.tar")
    assert isinstance(rejected, Rejected) and rejected.reason.startswith("file too large: k.json, ")


# Tars that are not whole


def whole(tmp_path: Path) -> bytes:
    members = [member for n in range(3) for member in ((f"{n}.json", record()), (f"{n}.png", picture(n)))]
    return write_shard(tmp_path / "whole.tar", members).read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_tar_is_always_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    tar = whole(folder)
    end = tar.rstrip(b"\0").__len__()  # what follows are the end mark and its padding
    cut = data.draw(st.one_of(st.integers(0, end), st.sampled_from(range(0, end + 1, 512))))
    (folder / "cut.tar").write_bytes(tar[:cut])
    with pytest.raises(
        ShardError, match=r"cut.tar is (truncated|damaged|no tar file).*make or copy the shard again"
    ):
        list(read_shard(folder / "cut.tar"))


def test_a_damaged_header_is_refused_not_taken_for_the_end(tmp_path):
    tar = bytearray(whole(tmp_path))
    tar[2048 + 150] ^= 1  # in the checksum of the third header
    (tmp_path / "bad.tar").write_bytes(tar)
    with pytest.raises(ShardError, match=r"bad.tar is damaged at byte \d+: neither a member nor the end"):
        list(read_shard(tmp_path / "bad.tar"))


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "a,b"},
        {"GNU.sparse.numblocks": "1", "GNU.sparse.size": "z"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"size": "9" * 40},
    ],
)
def test_whatever_tarfile_raises_at_a_header_names_the_shard(tmp_path, before, headers):
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(before + 1):
            info = tarfile.TarInfo(f"{number}.json")
            info.size, info.pax_headers = 512, headers if number == before else {}
            tar.addfile(info, io.BytesIO(b"garbage\n" * 64))
    with pytest.raises(ShardError, match=r"bad.tar is (no tar file|damaged).*; make or copy the shard again"):
        list(read_shard(tmp_path / "bad.tar"))


def test_bytes_after_the_end_mark_are_refused(tmp_path):
    (tmp_path / "two.tar").write_bytes(whole(tmp_path) * 2)
    with pytest.raises(ShardError, match="neither a member nor the end"):
        list(read_shard(tmp_path / "two.tar"))


def test_an_empty_archive_holds_no_samples(tmp_path):
    assert list(read_shard(write_shard(tmp_path / "a.tar", []))) == []


def test_a_compressed_tar_is_refused_with_its_remedy(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole(tmp_path)))
    with pytest.raises(ShardError, match=r"a.tar is compressed with gzip, .*; unpack it"):
        list(read_shard(tmp_path / "a.tar"))


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"none.tar cannot be read \(No such file or directory\)"):
        list(read_shard(tmp_path / "none.tar"))


def test_a_span_beyond_the_file_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("k.json", record(TEXT_TURNS))])
    (sample,) = read_shard(path)
    assert isinstance(sample, Sample)
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(ShardError, match=r"k.json should be \d+ bytes at 512, found 8; .*restore it"):
        read_span(path, sample.json_span)
