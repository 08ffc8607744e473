"""A part is published wholly or not at all, once, by whoever is first."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import (
    ARRAYS,
    DIGEST_A,
    FINGERPRINT,
    entry,
    fill_part,
    flip_bit,
    image_arrays,
    manifest,
    rewrite_record,
    sample_arrays,
    snapshot,
    write_store,
)

from cache import (
    ArrayMismatch,
    CacheError,
    CorruptPart,
    DuplicateKey,
    FingerprintMismatch,
    ForeignPart,
    HoldsFewer,
    MisusedWriter,
    PartLost,
    PartSummary,
    RefusedValue,
    SchemaError,
    Store,
    StoreNotFound,
    StoreWriter,
    UnreadableFile,
    UnsafeName,
    verify,
)
from cache.files import durable
from cache.files.durable import hash_bytes
from cache.format.records import Counts, FileRecord, PartRecord
from cache.write.part_folder import PartFolder

PART = "shard-000000"


def finish(writer: StoreWriter, name: str = PART, prefix: str = "a") -> Any:
    with writer.part(name, source={"name": f"{name}.tar", "bytes": 1}) as part:
        fill_part(part, prefix)
        return part.commit(seen=4)


def test_a_committed_part_is_counted_and_done(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest())
    assert not writer.is_done(PART)
    summary = finish(writer)
    assert (summary.seen, summary.cached, summary.rejected, summary.images) == (4, 3, 1, 2)
    assert set(summary.array_bytes) == {spec.name for spec in ARRAYS} and not summary.already_done
    attention = tmp_path / "s/parts" / PART / "attention"
    on_disk = sum(file.stat().st_size for file in attention.rglob("layer_0*/**/*") if file.is_file())
    assert summary.array_bytes["attention/layer_0"] == on_disk
    assert writer.is_done(PART) and not writer.is_done("shard-000001")
    assert list((tmp_path / "s/tmp").iterdir()) == []


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    assert snapshot(write_store(tmp_path / "one")) == snapshot(write_store(tmp_path / "two"))


def test_a_part_without_samples_is_a_part(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest(PART))
    with writer.part(PART, source={}) as part:
        assert part.commit().seen == 0
    assert verify(tmp_path / "s", deep=True).problems == ()
    assert len(Store(tmp_path / "s")) == 0


def test_leaving_on_an_exception_or_without_commit_publishes_nothing(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest())
    before = snapshot(tmp_path / "s")
    with pytest.raises(ZeroDivisionError), writer.part(PART, source={}) as part:
        fill_part(part, "a")
        _ = 1 / 0
    with writer.part(PART, source={}) as part:
        fill_part(part, "a")
    assert snapshot(tmp_path / "s") == before and not list((tmp_path / "s/tmp").iterdir())
    assert not writer.is_done(PART)


def test_reopening_unites_the_plan_and_keeps_the_rest(tmp_path: Path) -> None:
    StoreWriter.open(tmp_path / "s", manifest("b", provenance={"command": "first"}))
    before = (tmp_path / "s/manifest.json").stat().st_mtime_ns
    again = StoreWriter.open(tmp_path / "s", manifest("b", provenance={"command": "second"}))
    assert (tmp_path / "s/manifest.json").stat().st_mtime_ns == before
    assert again.manifest.provenance == {"command": "first"}
    assert StoreWriter.open(tmp_path / "s", manifest("a", "c")).manifest.planned_parts == ("a", "b", "c")
    assert Store(tmp_path / "s").missing_parts == ("a", "b", "c")


def test_a_field_of_the_provenance_is_added_to_what_other_writers_wrote(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest("a", provenance={"command": "first"}))
    digest = writer.manifest.contents_digest()
    StoreWriter.open(tmp_path / "s", manifest("b"))
    for value in (1, 2):
        writer.set_provenance("measured", {"value": value})
        stored = Store(tmp_path / "s").manifest
        assert stored.provenance == {"command": "first", "measured": {"value": value}}
        assert writer.manifest.provenance == stored.provenance
    assert stored.planned_parts == ("a", "b") and stored.contents_digest() == digest


def test_a_store_of_another_fingerprint_is_refused_and_untouched(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    before = snapshot(path)
    wider = replace(ARRAYS[4], row_shape=(8,))
    mine = manifest(
        "new", fingerprint=replace(FINGERPRINT, template="other"), arrays=(*ARRAYS[:4], wider, ARRAYS[5])
    )
    with pytest.raises(FingerprintMismatch) as caught:
        StoreWriter.open(path, mine)
    assert [difference.field for difference in caught.value.differences] == ["template", "arrays[hidden]"]
    text = str(caught.value)
    assert f"The store at {path} holds something else" in text and "template: 7a -> other" in text
    assert "; arrays[hidden]: row_shape: [4] -> [8]. " in text and "write to another directory" in text
    assert snapshot(path) == before


def test_an_array_more_or_less_is_a_difference(tmp_path: Path) -> None:
    StoreWriter.open(tmp_path / "s", manifest(arrays=ARRAYS[:2]))
    with pytest.raises(FingerprintMismatch, match=r"arrays\[vision\]: \{.*\} -> absent"):
        StoreWriter.open(tmp_path / "s", manifest(arrays=ARRAYS[:1]))


def test_a_directory_with_other_things_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(
        StoreNotFound, match=r"found a directory with other things in it, such as 'photo\.jpg'"
    ):
        StoreWriter.open(tmp_path, manifest())
    with pytest.raises(StoreNotFound, match="found a file"):
        StoreWriter.open(tmp_path / "photo.jpg", manifest())
    assert snapshot(tmp_path) == {"photo.jpg": b"mine"}


def test_a_manifest_that_is_no_json_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        StoreWriter.open(tmp_path / "s", manifest(teacher={"name": object()}))
    with pytest.raises(SchemaError):
        StoreWriter.open(tmp_path / "s", manifest(arrays=(replace(ARRAYS[0], codec="zip"),)))
    assert not (tmp_path / "s").exists()


def test_a_part_that_is_not_planned_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest())
    with pytest.raises(
        MisusedWriter, match="Part 'other' is not among the 2 planned parts of the store; open"
    ):
        writer.part("other", source={})
    with pytest.raises(UnsafeName, match=r"'\.\./other' cannot name a part"):
        writer.part("../other", source={})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hidden", np.nan, RefusedValue),
        ("logits/values", np.inf, RefusedValue),
        ("vision", 300, RefusedValue),
    ],
)
def test_a_refused_value_changes_nothing_and_the_part_goes_on(
    tmp_path: Path, name: str, value: float, error: type[RefusedValue]
) -> None:
    StoreWriter.open(tmp_path / "clean", manifest(PART))
    bad = (image_arrays if name == "vision" else sample_arrays)(1)
    bad[name].flat[3] = value
    writer = StoreWriter.open(tmp_path / "s", manifest(PART))
    with writer.part(PART, source={}) as part:
        part.add_image(DIGEST_A, image_arrays(1))
        with pytest.raises(error, match=f"^Array '{name}': "):
            if name == "vision":
                part.add_image("c" * 64, bad)
            else:
                part.add(entry("k0", DIGEST_A), bad)
        part.reject("k0", "not finite")
        part.add(entry("k1", DIGEST_A), sample_arrays(2))
        summary = part.commit(seen=2)
    assert (summary.cached, summary.rejected, summary.images) == (1, 1, 1)
    store = Store(tmp_path / "s")
    assert store.rejects(PART) == [("k0", "not finite")]
    assert (store.read("k1", ["hidden"])["hidden"] == sample_arrays(2)["hidden"]).all()
    assert verify(tmp_path / "s", deep=True).problems == ()


def test_what_does_not_belong_into_a_part_is_told(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest())
    with writer.part(PART, source={}) as part:
        part.add_image(DIGEST_A, image_arrays(1))
        assert part.has_image(DIGEST_A) and not part.has_image("c" * 64)
        with pytest.raises(
            MisusedWriter, match=f"Image {DIGEST_A} was already added to part '{PART}'; ask has_"
        ):
            part.add_image(DIGEST_A, image_arrays(1))
        with pytest.raises(
            MisusedWriter, match=f"Sample 'k' points at image cc.* which part '{PART}' does not hold"
        ):
            part.add(entry("k", "c" * 64), sample_arrays(1))
        part.add(entry("k"), sample_arrays(1))
        with pytest.raises(
            DuplicateKey, match=f"Sample key 'k' appears twice in part '{PART}'; give every sample"
        ):
            part.add(entry("k"), sample_arrays(1))
        with pytest.raises(
            ArrayMismatch, match="Array 'labels': expected the arrays of one sample: attention"
        ):
            part.add(entry("m"), sample_arrays(1) | {"labels": np.zeros(3, np.int32)})
        with pytest.raises(
            ArrayMismatch, match="Array 'vision': expected the arrays of one image: vision, found none"
        ):
            part.add_image("c" * 64, {})
        with pytest.raises(
            ArrayMismatch, match="Array 'vision': expected one row for one image, found 2 rows"
        ):
            part.add_image("c" * 64, {"vision": np.zeros((2, 4, 6), np.float32)})
        with pytest.raises(
            MisusedWriter, match=r"5 samples were seen, but 1 cached \+ 0 rejected = 1; add or reject"
        ):
            part.commit(seen=5)
        part.commit(seen=1)
        with pytest.raises(
            MisusedWriter, match=f"Part '{PART}' is committed or left and takes nothing more; open a new"
        ):
            part.reject("z", "late")
    assert list(Store(tmp_path / "s").keys()) == ["k"]


def test_what_the_caller_does_to_its_arrays_later_does_not_matter(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path / "s", manifest())
    arrays = sample_arrays(3)
    with writer.part(PART, source={}) as part:
        part.add(entry("k"), arrays)
        for array in arrays.values():
            array[...] = 1
        part.commit()
    assert (Store(tmp_path / "s").read("k", ["hidden"])["hidden"] == sample_arrays(3)["hidden"]).all()


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    one, two = (StoreWriter.open(tmp_path / "s", manifest()) for _ in range(2))
    with one.part(PART, source={}) as first, two.part(PART, source={}) as second:
        fill_part(first, "a")
        second.reject("only", "one reject")
        assert not first.commit().already_done
        before = snapshot(tmp_path / "s/parts")
        summary = second.commit()
    assert summary.already_done and summary.cached == 3  # what the store holds, not what was thrown away
    assert snapshot(tmp_path / "s/parts") == before and not list((tmp_path / "s/tmp").iterdir())


def refill(writer: StoreWriter, *, replace: bool = False, **allowed: bool) -> PartSummary:
    with writer.part(PART, source={"name": f"{PART}.tar", "bytes": 10240}) as part:
        fill_part(part, "a")
        return part.commit(replace=replace, **allowed)


def test_a_part_without_its_done_mark_is_done_again(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    sound = snapshot(path)
    (path / "parts" / PART / "part.json").unlink()
    writer = StoreWriter.open(path, manifest())
    assert not writer.is_done(PART) and writer.is_done("shard-000001")
    assert not refill(writer).already_done
    assert snapshot(path) == sound


DAMAGED_MARKS: dict[str, tuple[Callable[[Path], Any], type[CacheError]]] = {
    "a flipped byte": (lambda mark: flip_bit(mark, offset=30), CorruptPart),
    "emptied": (lambda mark: mark.write_bytes(b""), CorruptPart),
    "of another store": (lambda mark: rewrite_record(mark.parent, contents="00" * 32), ForeignPart),
    # Reading a process's memory at 0 is an input/output error, for root too.
    "a disk error": (lambda mark: (mark.unlink(), mark.symlink_to("/proc/self/mem")), UnreadableFile),
}


@pytest.mark.parametrize(("damage", "error"), DAMAGED_MARKS.values(), ids=DAMAGED_MARKS)
def test_a_done_mark_that_cannot_be_read_is_no_unfinished_part(
    damage: Callable[[Path], Any], error: type[CacheError], tmp_path: Path
) -> None:
    path = write_store(tmp_path / "s")
    sound, arrays = snapshot(path), snapshot(path / "parts" / PART / "vision")
    damage(path / "parts" / PART / "part.json")
    writer = StoreWriter.open(path, manifest())
    with pytest.raises(error, match=r"part\.json"):
        writer.is_done(PART)
    with pytest.raises(error, match=r"part\.json"):
        refill(writer)
    assert snapshot(path / "parts" / PART / "vision") == arrays
    assert not refill(writer, replace=True).already_done
    assert snapshot(path) == sound


@pytest.mark.parametrize("mark", ["sound", "damaged"])
def test_a_part_is_not_replaced_by_one_that_holds_fewer_unless_that_is_asked_for(
    mark: str, tmp_path: Path
) -> None:
    path = write_store(tmp_path / "s")
    if mark == "damaged":
        flip_bit(path / "parts" / PART / "part.json", offset=30)
    before = snapshot(path / "parts")
    writer = StoreWriter.open(path, manifest())
    for allowed in (False, True):
        with writer.part(PART, source={}) as part:
            part.add(entry("a0"), sample_arrays(1))
            if allowed:
                assert part.commit(replace=True, may_hold_fewer=True).cached == 1
            else:
                with pytest.raises(HoldsFewer, match="it holds 3 samples, captured again it would hold 1"):
                    part.commit(replace=True)
                assert snapshot(path / "parts") == before
    assert len(Store(path)) == 4 and not list((path / "tmp").iterdir())


def test_a_commit_whose_files_another_process_removed_publishes_nothing(tmp_path: Path) -> None:
    """As when two machines take each other's processes for dead ones."""
    path = tmp_path / "s"
    folder = PartFolder(StoreWriter.open(path, manifest()).path, PART)
    folder.write("a", b"kept")
    folder.write("b/c", b"removed")
    (folder.path / "b/c").unlink()
    record = PartRecord(PART, "", {}, Counts(0, 0, 0, 0, 0), None, folder.files)
    with pytest.raises(PartLost, match=r"1 of its files, such as b/c, vanished"):
        folder.publish(record)
    assert not (path / "parts" / PART).exists()


def test_a_part_is_sealed_with_what_was_written_and_not_with_what_lies_in_its_folder(tmp_path: Path) -> None:
    folder = PartFolder(StoreWriter.open(tmp_path / "s", manifest()).path, PART)
    folder.write("a", b"written")
    (folder.path / "a").write_bytes(b"changed")  # as long, and not what was written
    (folder.path / ".DS_Store").write_bytes(b"stray")
    assert folder.files == {"a": FileRecord(7, hash_bytes(b"written"))}


def test_a_key_that_another_writer_published_meanwhile_is_refused_at_commit(tmp_path: Path) -> None:
    one, two = (StoreWriter.open(tmp_path / "s", manifest()) for _ in range(2))
    with one.part(PART, source={}) as first, two.part("shard-000001", source={}) as second:
        first.add(entry("k"), sample_arrays(1))
        second.add(entry("k"), sample_arrays(1))
        second.add(entry("l"), sample_arrays(2))
        assert second.taken_elsewhere() == []
        first.commit()
        assert second.taken_elsewhere() == [("k", PART)]
        with pytest.raises(DuplicateKey, match=f"'k' appears in parts {PART!r} and 'shard-000001'"):
            second.commit()
    with two.part("shard-000001", source={}) as second:
        second.add(entry("k"), sample_arrays(1))
        second.add(entry("l"), sample_arrays(2))
        second.withdraw("k", "key occurs in another shard")
        second.commit(seen=2)
    store = Store(tmp_path / "s")
    assert sorted(store.keys()) == ["k", "l"] and store.rejects("shard-000001")[0][0] == "k"


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_directories_is_noted_once(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert len(Store(write_store(tmp_path / "s"))) == 6
    assert [record.message.count("cannot sync a directory") for record in caplog.records] == [1]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        durable.write_file(Path("/dev/full"), b"x" * 10)


def test_another_writer_is_opened_only_by_its_own_store(tmp_path: Path) -> None:
    """A part copied from a store of another fingerprint is refused here, and not taken for unfinished."""
    path = write_store(tmp_path / "s")
    other = StoreWriter.open(tmp_path / "o", manifest(fingerprint=replace(FINGERPRINT, teacher="00")))
    os.rename(path / "parts" / PART, tmp_path / "o/parts" / PART)
    with pytest.raises(ForeignPart, match="written for a store of another fingerprint"):
        other.is_done(PART)
