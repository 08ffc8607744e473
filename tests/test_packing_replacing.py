"""Packing again over a finished pack: the old one stays until the new one is whole, and holds no fewer samples."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from test_packing import entry, picture, rejects_of, samples_of, write

from pipeline.errors import PackError
from pipeline.packing.pack import pack


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path, images) -> Path:
    write(tmp_path, [entry(f"{number}", f"{number}.png") for number in range(5)])
    assert rerun(tmp_path / "out") == set("01234")
    return tmp_path / "out"


def rerun(out: Path, **options) -> set[str]:
    """Keys of the pack afterwards."""
    options = {"image_folder": out.parent / "images", "samples_per_shard": 2, **options}
    pack(out.parent / "data.json", out, **options)
    assert not list(out.glob("again.*")) and not list(out.glob("*unfinished*"))
    return {sample.key for sample in samples_of(out)}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_again_with_fail_keeps_the_old_pack_and_lists_the_bad_sample(out, images):
    rerun(out, again=True, on_bad_sample="fail")
    before = contents(out)
    (images / "3.png").write_bytes(b"x")
    with pytest.raises(
        PackError, match=r"1 bad sample\(s\), .*correct what .*/again.unfinished/rejects.jsonl"
    ):
        rerun(out, again=True, on_bad_sample="fail")
    assert contents(out) == before and not list(out.glob("*/*.tar*"))
    assert [row["id"] for row in rejects_of(out / "again.unfinished")] == ["3"]
    (images / "3.png").write_bytes(picture(3))
    assert rerun(out, again=True, on_bad_sample="fail") == set("01234")


@pytest.mark.parametrize("described", ["as it was", "damaged"])
def test_a_pack_of_more_samples_is_replaced_only_where_that_is_asked_for(out, images, described):
    if described == "damaged":
        (out / "pack.json").write_text("{")
    before = contents(out)
    for file in list(images.iterdir())[:3]:
        file.unlink()
    with pytest.raises(
        PackError, match=r"is left as it is: it holds 5 samples, and .* would hold 2; .*--allow-f"
    ):
        rerun(out, again=True)
    assert contents(out) == before and not list(out.glob("*/*.tar*"))
    assert len(rejects_of(out / "again.unfinished")) == 3
    assert len(rerun(out, again=True, allow_fewer=True)) == 2 and len(rejects_of(out)) == 3


def test_an_interrupted_again_leaves_the_old_pack_and_the_next_run_removes_what_it_left(out):
    before = contents(out)

    def interrupt(done: int, total: int | None) -> None:
        if total and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rerun(out, again=True, progress=interrupt)
    assert contents(out) == before
    (out / "again.unfinished" / "shard-000000.tar").write_bytes(b"as a kill leaves it")
    assert rerun(out) == set("01234") and contents(out) == before


@pytest.mark.slow
def test_wherever_the_replacement_is_killed_the_next_run_has_the_old_pack_or_the_new_one(out, monkeypatch):
    left: list[int] = []  # calls until the kill

    def killing(call):
        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return step

    ends: list[set[str]] = []
    for kill_at in range(1, 100):
        write(out.parent, [entry(f"{number}", f"{number}.png") for number in range(5)])
        rerun(out, again=True, allow_fewer=True, samples_per_shard=1)
        (out.parent / "data.json").rename(out.parent / "old.json")
        write(out.parent, [entry(f"new{number}", f"{number % 5}.png") for number in range(9)])
        left[:] = [kill_at]
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            for name in ("replace", "rename", "unlink", "rmdir"):
                patched.setattr(os, name, killing(getattr(os, name)))
            rerun(out, again=True, samples_per_shard=4)
            break
        try:
            ends.append(rerun(out, samples_per_shard=4))
        except PackError as error:
            assert "holds a pack of other input: annotations" in str(error)
            (out.parent / "old.json").rename(out.parent / "data.json")
            ends.append(rerun(out, samples_per_shard=1))
    old, new = set("01234"), {f"new{number}" for number in range(9)}
    assert len(ends) > 15 and ends == [old] * ends.count(old) + [new] * ends.count(new)
    assert old in ends and new in ends


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"shards": 5}', "\udcff"])
def test_a_damaged_description_is_made_good_by_again(out, text):
    (out / "pack.json").write_text(text, errors="surrogateescape")
    before = contents(out)
    with pytest.raises(
        PackError, match=r"pack.json cannot be read .*; name another output, or .* --again\.$"
    ):
        rerun(out)
    assert contents(out) == before
    assert rerun(out, again=True) == set("01234") == rerun(out)


def test_again_packs_edited_annotations_and_other_settings(out):
    write(out.parent, [entry(f"{number}", f"{number % 5}.png") for number in range(6)])
    with pytest.raises(PackError, match="annotations was"):
        rerun(out)
    assert rerun(out, again=True) == set("012345")
    assert rerun(out, again=True, samples_per_shard=9) == set("012345")
    assert [path.name for path in out.glob("*.tar")] == ["shard-000000.tar"]


def test_images_that_only_an_interrupted_retry_packed_may_change(out, images):
    (images / "3.png").unlink()
    (images / "4.png").unlink()
    rerun(out, again=True, allow_fewer=True)
    before = contents(out)
    (images / "3.png").write_bytes(picture(3))
    rerun(out)
    # As a kill just before the new pack.json leaves it.
    for name in ("pack.json", *(name for name in before if name.startswith("pack.rejects."))):
        (out / name).write_bytes(before[name])
    (out / "pack.unfinished.json").write_text("{}")
    (images / "3.png").write_bytes(picture(33))
    done: list[tuple[int, int]] = []
    assert rerun(out, progress=lambda *at: done.append(at) if at[1] else None) == set("0123")
    assert done == [(1, 1)]
    assert (images / "3.png").read_bytes() in [sample.images[0] for sample in samples_of(out)]
    before = contents(out)
    rerun(out)
    assert contents(out) == before
    (images / "3.png").write_bytes(picture(44))
    with pytest.raises(PackError, match=r"1 image\(s\) changed after they were packed, first 3.png"):
        rerun(out)


@pytest.mark.parametrize("way", ["moved", "relative", "through a link"])
def test_the_same_images_by_another_path_are_the_same_input(out, images, way, monkeypatch):
    before = contents(out)
    folder = images
    if way == "moved":
        folder = images.rename(out.parent / "elsewhere")
    elif way == "relative":
        monkeypatch.chdir(out.parent)
        folder = Path("images")
    else:
        folder = out.parent / "link"
        folder.symlink_to(images)
    assert rerun(out, image_folder=folder) == set("01234") and contents(out) == before


def test_another_folder_is_other_input_where_images_differ_or_are_missing(out, images):
    before = contents(out)
    other = images.rename(out.parent / "other")
    (other / "2.png").write_bytes(picture(22))
    with pytest.raises(PackError, match=r"1 image\(s\) changed after they were packed, first 2.png"):
        rerun(out, image_folder=other)
    (other / "2.png").unlink()
    with pytest.raises(
        PackError,
        match=r"image_folder was .*images, now .*other, where 1 of its images are missing, first 2.png",
    ):
        rerun(out, image_folder=other)
    assert contents(out) == before


def test_an_entry_that_a_moved_folder_cannot_serve_stays_rejected(tmp_path, images):
    write(tmp_path, [entry("0", "0.png"), entry("late", str(images / "late.png"))])
    out = tmp_path / "out"
    assert rerun(out) == {"0"}
    elsewhere = images.rename(tmp_path / "elsewhere")
    (elsewhere / "late.png").write_bytes(picture(7))
    assert rerun(out, image_folder=elsewhere) == {"0"}
    assert [row["id"] for row in rejects_of(out)] == ["late"]
