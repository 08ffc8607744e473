"""Packing again: a finished pack depends on the images it read; what was rejected for them is tried again."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_packing import entry, picture, rejects_of, samples_of, write

from pipeline.errors import PackError
from pipeline.packing.pack import pack

ENTRIES = [
    entry("a", "0.png"), entry("gone", "late.png"), entry("b", "1.png"), entry("cut", "cut.png"),
    entry("pair", ["0.png", "late.png"]), entry("gone", "late.png"), {"id": "bad", "conversations": []},
]  # fmt: skip


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "cut.png").write_bytes(picture(5)[:-300])
    return folder


@pytest.fixture
def out(tmp_path, images) -> Path:
    summary = pack(write(tmp_path, ENTRIES), tmp_path / "out", image_folder=images)
    assert (summary.packed, summary.rejected) == (2, 5)
    return tmp_path / "out"


def rerun(out: Path, **options) -> tuple[set[str], list[str]]:
    """Keys of the pack afterwards, and what was said."""
    said: list[str] = []
    images = out.parent / "images"
    pack(out.parent / "data.json", out, image_folder=images, say=said.append, **options)
    assert not list(out.glob("*.part")) and not (out / "pack.unfinished.json").exists()
    return {sample.key for sample in samples_of(out)}, said


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_entries_whose_images_were_repaired_are_packed_into_further_shards(out, images):
    before = contents(out)
    (images / "late.png").write_bytes(picture(7))
    keys, said = rerun(out)
    assert said == ["3 rejected entries whose images changed are tried again; what is packed stays as it is"]
    assert keys == {"a", "b", "gone", "gone+2", "pair"}
    assert contents(out)["shard-000000.tar"] == before["shard-000000.tar"]
    assert (out / "shard-000001.tar").is_file()
    assert [(row["id"], row["line"]) for row in rejects_of(out)] == [("cut", 4), ("bad", 7)]
    (images / "cut.png").write_bytes(picture(5))
    keys, said = rerun(out)
    assert (
        len(said) == 1
        and said[0].startswith("1 rejected")
        and keys == {"a", "b", "gone", "gone+2", "pair", "cut"}
    )
    assert [row["reason"] for row in rejects_of(out)] == [
        "empty conversations: 0 turn(s), none of them human's"
    ]
    shutil.rmtree(out)
    assert rerun(out)[0] == keys


def test_an_image_that_changed_and_is_still_bad_is_not_tried_a_third_time(out, images):
    (images / "cut.png").write_bytes(picture(5)[:-200])
    assert rerun(out)[1][0].startswith("1 rejected entry whose images changed is tried")
    keys, said = rerun(out)
    assert keys == {"a", "b"} and "nothing was done" in said[0]


@pytest.mark.parametrize(
    "change", ["nothing", "annotations renamed", "annotations touched", "images touched"]
)
def test_where_no_bytes_changed_nothing_is_done_and_the_way_to_pack_again_is_named(out, images, change):
    before = contents(out)
    if change == "annotations renamed":
        (out.parent / "data.json").rename(out.parent / "other.json")
        (out.parent / "data.json").symlink_to("other.json")
    for file in {
        "annotations touched": [out.parent / "data.json"],
        "images touched": images.glob("[01]*"),
    }.get(change, ()):
        os.utime(file, ns=(1, 1))
    _, said = rerun(out)
    assert said == [
        f"{out} holds a finished pack of this input: nothing was done; --again packs everything again"
    ]
    assert contents(out) == before


def test_an_image_that_changed_after_it_was_packed_is_named_and_again_packs_it(out, images):
    other = picture(8)
    (images / "1.png").write_bytes(other)
    before = contents(out)
    with pytest.raises(
        PackError, match=r"1 image\(s\) changed after they were packed, first 1.png; .*--again"
    ):
        rerun(out)
    assert contents(out) == before
    assert rerun(out, again=True) == ({"a", "b"}, [])
    assert other in [image for sample in samples_of(out) for image in sample.images]
    assert "nothing was done" in rerun(out)[1][0]


def test_a_change_that_keeps_size_and_content_apart_is_seen(out, images):
    data = bytearray((images / "1.png").read_bytes())
    data[-20] ^= 1
    (images / "1.png").write_bytes(data)
    os.utime(images / "1.png", ns=(1, 1))
    with pytest.raises(PackError, match=r"first 1\.png"):
        rerun(out)


def test_images_that_were_removed_after_packing_are_not_missed(out, images):
    (images / "0.png").unlink()
    assert "nothing was done" in rerun(out)[1][0]


def test_with_allow_fewer_the_old_pack_is_not_read(out):
    shard = out / "shard-000000.tar"
    (out / "pack.json").write_text("damaged, so that its shards would be counted")
    shard.unlink()
    os.mkfifo(shard)  # whoever opens it waits for good
    assert rerun(out, again=True, allow_fewer=True)[0] == {"a", "b"}


def test_again_makes_good_a_pack_that_lost_a_shard(out):
    (out / "shard-000000.tar").unlink()
    assert rerun(out, again=True)[0] == {"a", "b"}


def test_wherever_adding_to_a_pack_ends_the_next_run_completes_it(out, images):
    old = {name: data for name, data in contents(out).items() if re.match(r"pack\.(json|rejects)", name)}
    (images / "late.png").write_bytes(picture(7))

    def interrupt(done: int, total: int | None) -> None:
        if total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rerun(out, progress=interrupt)
    assert rerun(out)[0] == {"a", "b", "gone", "gone+2", "pair"}
    whole = contents(out)
    # As a crash leaves it between the new shards, rejects and images on the one hand and pack.json on the other.
    for name, data in old.items():
        (out / name).write_bytes(data)
    (out / "pack.unfinished.json").write_text("{}")
    (out / "shard-000002.tar.part").write_bytes(b"half a shard")
    with open(out / "pack.images.jsonl", "a") as file:
        file.write('["late.png", [1')
    assert rerun(out)[0] == {"a", "b", "gone", "gone+2", "pair"}
    names = set(whole) - {"pack.images.jsonl"}
    assert {name: contents(out)[name] for name in names} == {name: whole[name] for name in names}
    assert "nothing was done" in rerun(out)[1][0]


def test_a_pack_that_an_earlier_version_added_to_can_be_added_to_again(out, images):
    # The earlier version began what it added to the record of images with an empty line.
    record, described = out / "pack.images.jsonl", json.loads((out / "pack.json").read_text())
    record.write_text("\n" + record.read_text())
    (out / "pack.json").write_text(json.dumps(described | {"images_size": described["images_size"] + 1}))
    assert "nothing was done" in rerun(out)[1][0]
    (images / "late.png").write_bytes(picture(7))
    assert rerun(out)[0] == {"a", "b", "gone", "gone+2", "pair"}
    (images / "1.png").write_bytes(picture(8))
    with pytest.raises(PackError, match=r"1 image\(s\) changed after they were packed, first 1.png"):
        rerun(out)


def test_a_foreign_shard_beside_a_finished_pack_is_never_overwritten(out, images):
    (out / "shard-000001.tar").write_bytes(b"mine")
    (images / "late.png").write_bytes(picture(7))
    before = contents(out)
    with pytest.raises(PackError, match=r"already holds shard-000001.tar, which is of no pack known here"):
        rerun(out)
    assert contents(out) == before


def test_a_failing_disk_ends_the_run_instead_of_rejecting_the_image(tmp_path):
    path = write(tmp_path, [entry("a", "mem")])
    with pytest.raises(OSError, match="Input/output error"):  # what reading a process's address 0 gives
        pack(path, tmp_path / "out", image_folder=Path("/proc/self"))
    assert not (tmp_path / "out" / "pack.json").exists()
