"""Stage 1 keeps finished parts: through reruns, repairs, changed shards, other writers and lack of memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from refusals import closed, open_folder, without_rights
from small_experiment import picture, shard_members, snapshot, write_shard
from small_store import flip_bit, manifest, write_store
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from watched import before_forward

import cli
from cache import (
    ForeignPart,
    Store,
    UnreadableFile,
    UnsupportedFormat,
    restore_manifest,
    summarise,
    verify,
)
from cache.format.codecs import CODECS, IntegerCodec
from cache.format.documents import document_bytes, read_document
from pipeline.config.config import to_yaml
from pipeline.data.shard_identity import shard_change, shard_source
from pipeline.errors import ConfigError
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.repair import repair_store

PART = "shard-000001"
TURNS = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "no"}]


@pytest.fixture
def copy(experiment, tmp_path):
    """A copy of the store and of its shards, and a config for both."""
    shutil.copytree(experiment.store, tmp_path / "store")
    shutil.copytree(experiment.shards, tmp_path / "shards")
    overrides = [f"cache.path={tmp_path}/store", f"data.shards={tmp_path}/shards"]
    return experiment.config(tmp_path, *overrides), tmp_path / "store", tmp_path / "shards"


def samples(*keys: str) -> list[tuple[str, bytes]]:
    text = json.dumps({"conversations": TURNS}).encode()
    return [(f"{key}.{kind}", data) for key in keys for kind, data in (("json", text), ("png", picture(0)))]


MARKS = {
    "a flipped byte": lambda mark: flip_bit(mark, offset=30),
    "emptied": lambda mark: mark.write_bytes(b""),
    # Reading a process's memory at 0 is an input/output error, for root too.
    "a disk error": lambda mark: (mark.unlink(), mark.symlink_to("/proc/self/mem")),
}


@pytest.mark.parametrize("damage", MARKS.values(), ids=MARKS)
def test_a_rerun_leaves_a_part_alone_whose_done_mark_cannot_be_read(damage, copy, experiment):
    config, store, _ = copy
    damage(store / "parts" / PART / "part.json")
    before = snapshot(store / "parts" / PART / "attention")
    run = cache_teacher(config)
    assert (run.parts_written, run.parts_found, run.seen) == (0, 2, 0)
    assert len(run.broken) == 1 and f"parts/{PART}/part.json" in run.broken[0]
    assert snapshot(store / "parts" / PART / "attention") == before


def test_a_damaged_done_mark_is_repaired_when_that_is_asked_for(copy, experiment):
    config, store, _ = copy
    flip_bit(store / "parts" / PART / "part.json", offset=30)
    repair = repair_store(config, verify(store, deep=True), say=lambda line: None)
    assert repair.recaptured == (PART,) and repair.report.problems == ()
    assert summarise(store).content == summarise(experiment.store).content


def test_a_part_without_its_done_mark_is_repaired_too(copy, experiment):
    config, store, _ = copy
    (store / "parts" / PART / "part.json").unlink()
    repair = repair_store(config, verify(store, deep=True), say=lambda line: None)
    assert repair.recaptured == (PART,) and repair.report.problems == ()
    assert summarise(store).content == summarise(experiment.store).content


def test_a_repair_that_cannot_capture_leaves_the_damaged_part(copy, experiment, tmp_path):
    config, store, _ = copy
    flip_bit(store / "parts" / PART / "vision/c/0", offset=20)
    before = snapshot(store / "parts")
    teacher = config.teacher.model_copy(update={"device": "cuda:99"})
    with pytest.raises(ConfigError, match=r"teacher.device: cuda:99 cannot be used here"):
        repair_store(
            config.model_copy(update={"teacher": teacher}), verify(store, deep=True), say=lambda line: None
        )
    assert snapshot(store / "parts") == before


def test_a_repair_names_stray_files_and_captures_nothing_for_them(copy, capsys, tmp_path):
    config, store, _ = copy
    (store / "parts" / PART / ".DS_Store").write_bytes(b"x")
    before = snapshot(store)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", str(store), "--fix", "--config", str(tmp_path / "config.yaml")])
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert (
        f"stray file: parts/{PART}/.DS_Store" in shown.out and f"{store}: 0 problems in 3 parts" in shown.out
    )
    assert snapshot(store) == before


def test_a_repair_does_not_swap_a_part_for_one_that_holds_fewer(copy):
    config, store, shards = copy
    flip_bit(store / "parts" / PART / "vision/c/0", offset=20)
    write_shard(shards / f"{PART}.tar", shard_members(shards / f"{PART}.tar")[:-2])
    before = snapshot(store / "parts")
    report = verify(store, deep=True)
    repair = repair_store(config, report, say=lambda line: None)
    assert not repair.recaptured and not repair.report.is_sound
    assert "it holds 5 samples, captured again it would hold 4" in repair.broken[0]
    assert snapshot(store / "parts") == before
    repair = repair_store(config, report, say=lambda line: None, may_hold_fewer=True)
    assert repair.report.problems == () and summarise(store).samples == 12


def test_a_shard_that_changed_is_reported_and_captured_again_by_request(copy, experiment, tmp_path, capsys):
    config, store, shards = copy
    write_shard(shards / f"{PART}.tar", [*shard_members(shards / f"{PART}.tar"), *samples("new")])
    before = snapshot(store / "parts")
    run = cache_teacher(config)
    assert (run.parts_written, run.parts_found) == (0, 3) and snapshot(store / "parts") == before
    assert len(run.changed) == 1 and run.changed[0].startswith(f"{shards}/{PART}.tar (")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    for command, code, said in (
        ("teacher-cache", 1, "with --recapture-changed captures what is there now"),
        (
            "distill",
            1,
            f"1 of 3 shards changed since they were cached in {store}, first {shards}/{PART}.tar (",
        ),
    ):
        found = run_of([command, "--config", str(tmp_path / "config.yaml")], capsys)
        assert found[0] == code and said in found[1]

    run = cache_teacher(config, recapture_changed=True)
    assert (run.parts_written, run.parts_found, run.changed) == (1, 2, ())
    assert "new" in Store(store) and verify(store, deep=True).problems == ()
    assert cache_teacher(config, recapture_changed=True).parts_written == 0
    untouched = {name: file for name, file in snapshot(store / "parts").items() if not name.startswith(PART)}
    assert untouched == {name: file for name, file in before.items() if not name.startswith(PART)}


def test_samples_may_move_between_shards_that_are_captured_again(copy):
    config, store, shards = copy
    one, two = (shards / f"shard-00000{number}.tar" for number in (0, 1))
    members = shard_members(one), shard_members(two)
    write_shard(one, members[1])
    write_shard(two, members[0])
    keys = set(Store(store).keys())
    run = cache_teacher(config, recapture_changed=True)
    assert (run.parts_written, run.rejected) == (2, 0)
    assert set(Store(store).keys()) == keys and verify(store, deep=True).problems == ()


def test_a_shard_is_known_by_size_and_members_and_not_by_when_it_was_copied(tmp_path):
    shard = write_shard(tmp_path / "a.tar", samples("a", "b"))
    source = shard_source(str(shard))
    os.utime(shard, (1, 1))
    assert shard_change(str(shard), source) is None
    write_shard(shard, samples("a", "c"))
    assert shard_change(str(shard), source) == "as large as it was, with other members"
    write_shard(shard, samples(*"abcdefghij"))
    assert "bytes when it was captured" in str(shard_change(str(shard), source))
    assert shard_change(str(shard), {"shard": "a.tar"}) is None  # recorded before there was more to compare


def test_a_shard_of_other_content_at_the_same_size_is_captured_again_by_request(copy):
    config, _, shards = copy
    members = [
        (name, data.replace(b"red", b"tan") if name.endswith("json") else data)
        for name, data in shard_members(shards / f"{PART}.tar")
    ]
    assert members != shard_members(shards / f"{PART}.tar")
    write_shard(shards / f"{PART}.tar", members)
    run = cache_teacher(config, recapture_changed=True)
    assert (run.parts_written, run.parts_found) == (1, 2)
    assert cache_teacher(config, recapture_changed=True).parts_written == 0


def test_a_part_never_makes_room_for_an_empty_one(copy):
    config, store, shards = copy
    before = snapshot(store / "parts")
    write_shard(shards / f"{PART}.tar", [("a.json", b"[]"), ("b.json", b"[]")])
    run = cache_teacher(config, recapture_changed=True)
    assert run.parts_written == 0 and "it holds 5 samples, captured again it would hold 0" in run.broken[0]
    assert snapshot(store / "parts") == before


def test_a_part_without_its_done_mark_makes_no_room_for_a_smaller_one(copy):
    config, store, shards = copy
    (store / "parts" / PART / "part.json").unlink()
    write_shard(shards / f"{PART}.tar", shard_members(shards / f"{PART}.tar")[:2])
    before = snapshot(store / "parts")
    run = cache_teacher(config)
    assert "it holds 5 samples, captured again it would hold" in run.broken[0]
    assert snapshot(store / "parts") == before


def test_keys_of_a_part_that_cannot_be_read_for_the_moment_stay_taken(copy):
    config, store, shards = copy
    moved = shard_members(shards / f"{PART}.tar")[:2]
    num_moved = len({name.split(".")[0] for name, _ in moved})
    write_shard(shards / "shard-000000.tar", [*shard_members(shards / "shard-000000.tar"), *moved])
    shutil.rmtree(store / "parts" / "shard-000000")
    mark = store / "parts" / PART / "part.json"
    kept = mark.read_bytes()
    MARKS["a disk error"](mark)
    run = cache_teacher(config)
    assert (run.parts_written, run.rejected, len(run.broken)) == (1, num_moved, 1)
    mark.unlink()
    mark.write_bytes(kept)
    assert cache_teacher(config).parts_found == 3 and verify(store, deep=True).problems == ()


def test_without_a_manifest_other_settings_do_not_take_over_the_parts(copy):
    config, store, shards = copy
    (store / "manifest.json").unlink()
    before = snapshot(store)
    logits = config.targets.logits.model_copy(update={"top_k": 4})
    other = config.targets.model_copy(update={"logits": logits})
    with pytest.raises(ForeignPart, match="another fingerprint or other arrays; it is not damaged"):
        cache_teacher(config.model_copy(update={"targets": other}))
    assert snapshot(store).keys() - {".lock"} == before.keys() - {".lock"}
    one = config.data.model_copy(update={"shards": str(shards / "shard-000000.tar")})
    assert cache_teacher(config.model_copy(update={"data": one})).parts_found == 1
    assert len(Store(store).parts) == 3 and verify(store, deep=True).problems == ()


def test_a_manifest_of_another_version_is_not_written_again(copy):
    config, store, _ = copy
    file = store / "manifest.json"
    file.write_bytes(document_bytes(read_document(file) | {"format_version": 99}))
    with pytest.raises(UnsupportedFormat):
        repair_store(config, verify(store, deep=True), say=lambda line: None)
    assert b'"format_version":99' in file.read_bytes()


def test_a_manifest_that_this_user_may_not_read_is_not_written_again():
    with open_folder() as folder:
        store = write_store(folder / "s")
        store.chmod(0o777)
        before = (store / "manifest.json").read_bytes()
        with closed(store / "manifest.json"), without_rights(), pytest.raises(UnreadableFile):
            restore_manifest(store, manifest())
        assert (store / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", [".ipynb_checkpoints", f"{PART}.bak", f"{PART} (copy)"])
def test_folders_beside_the_parts_are_named_and_hinder_nothing(name, copy):
    config, store, _ = copy
    shutil.copytree(store / "parts" / PART, store / "parts" / name)
    assert cache_teacher(config).parts_found == 3 and len(Store(store)) == 13
    flip_bit(store / "parts" / PART / "vision/c/0", offset=20)
    repair = repair_store(config, verify(store, deep=True), say=lambda line: None)
    assert repair.recaptured == (PART,) and [p.file for p in repair.report.problems] == [f"parts/{name}"]


def test_a_repair_reports_what_it_did_beside_what_it_could_not(copy):
    config, store, shards = copy
    for part in ("shard-000000", PART):
        flip_bit(store / "parts" / part / "vision/c/0", offset=20)
    (shards / "shard-000000.tar").write_bytes(b"garbage" * 1000)
    repair = repair_store(config, verify(store, deep=True), say=lambda line: None)
    assert repair.recaptured == (PART,) and "shard-000000.tar is no tar file" in repair.broken[0]


def test_a_copied_shard_makes_a_store_of_the_same_content(experiment, tmp_path):
    shutil.copytree(experiment.shards, tmp_path / "shards", copy_function=shutil.copyfile)  # with other times
    store = tmp_path / "store"
    cache_teacher(experiment.config(tmp_path, f"cache.path={store}", f"data.shards={tmp_path}/shards"))
    assert summarise(store).content == summarise(experiment.store).content


def test_a_key_that_another_worker_published_meanwhile_is_rejected(experiment, tmp_path):
    """The writer of the second shard began when the first had no part: it learns of the key at its commit."""
    configs = [
        experiment.config(
            tmp_path,
            f"data.shards={write_shard(tmp_path / 'shards' / f'{name}.tar', samples(*keys))}",
            f"cache.path={tmp_path}/store",
        )
        for name, keys in (("first", "ab"), ("second", "bc"))
    ]
    writers = [lambda: cache_teacher(configs[0])]
    with before_forward(LlamaDecoderLayer, lambda *_: writers and writers.pop()()):
        run = cache_teacher(configs[1])
    store = Store(tmp_path / "store")
    assert sorted(store.keys()) == ["a", "b", "c"] and (run.cached, run.rejected) == (1, 1)
    assert store.rejects("second") == [("b", "key occurs in another shard: the part first holds it")]
    assert verify(tmp_path / "store", deep=True).problems == ()


class StarvedCodec(IntegerCodec):
    """Runs out of memory for some rows."""

    def __init__(self, is_starved: Callable[[np.ndarray], bool]):
        object.__setattr__(self, "is_starved", is_starved)

    def encode(self, rows, options):
        if self.is_starved(rows):
            raise MemoryError("Unable to allocate 2.00 GiB")
        return super().encode(rows, options)


@pytest.mark.parametrize("failures", [1, 3])
def test_memory_that_runs_out_while_values_are_encoded_loses_no_sample(
    failures, experiment, tmp_path, monkeypatch
):
    left = iter(range(failures))
    monkeypatch.setitem(CODECS, "integer", StarvedCodec(lambda rows: next(left, None) is not None))
    overrides = [f"cache.path={tmp_path}/store", "teacher.batch_size=2"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert (run.seen, run.rejected) == (summarise(experiment.store).samples, 0)
    assert sorted(Store(tmp_path / "store").keys()) == sorted(Store(experiment.store).keys())


def test_a_sample_whose_values_never_fit_is_rejected_with_its_size(experiment, tmp_path, monkeypatch):
    victim = next(iter(Store(experiment.store).keys()))
    tokens = Store(experiment.store).read(victim, ["input_ids"])["input_ids"]
    monkeypatch.setitem(CODECS, "integer", StarvedCodec(lambda rows: np.array_equal(rows, tokens)))
    run = cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store"))
    store = Store(tmp_path / "store")
    [(key, reason)] = [reject for part in store.parts for reject in store.rejects(part)]
    assert (run.rejected, key) == (1, victim)
    assert reason.startswith("does not fit into memory: ") and "while its values were encoded" in reason


def run_of(arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_a_run_that_keeps_nothing_fails(experiment, tmp_path, capsys):
    write_shard(tmp_path / "shards/a.tar", [("a.json", b"[]"), ("b.json", b"[]")])
    overrides = [f"data.shards={tmp_path}/shards", f"cache.path={tmp_path}/store"]
    code, said = run_of(["teacher-cache", "--config", str(experiment.file), *overrides], capsys)
    assert code == 1 and said.endswith(
        "the store holds no sample: all 2 were rejected, for the reasons above\n"
    )


def test_an_interrupt_says_what_is_left_and_how_to_resume(experiment, tmp_path, capsys):
    first, layers = tmp_path / "store/parts/shard-000000/part.json", itertools.count()

    def interrupt_in_the_second_shard(layer, *_):
        if layer.self_attn.layer_idx == 0 and next(layers) == 1:
            while not first.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    overrides = [f"cache.path={tmp_path}/store", "teacher.batch_size=16"]  # a shard is one batch
    with before_forward(LlamaDecoderLayer, interrupt_in_the_second_shard):
        code, said = run_of(["teacher-cache", "--config", str(experiment.file), *overrides], capsys)
    assert code == 130
    assert "interrupted with 2 of 3 parts missing; run the same command again to resume" in said
    assert len(Store(Path(tmp_path / "store")).parts) == 1
