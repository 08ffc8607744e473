"""Stage 1: every sample is cached or rejected, a rerun does nothing, a kill loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_experiment import copy_of_teacher, picture, snapshot, stored_arrays, weights, write_shard
from watched import before_forward

from cache import FingerprintMismatch, Store, summarise, verify
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import read_shard
from pipeline.errors import BadSample, ConfigError, ShardError
from pipeline.models.mobilevlm.vision import VisionTower
from pipeline.teacher_cache.teacher import cache_teacher

ROOT = Path(__file__).parent.parent
TURNS = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "no"}]
NO_SUCH_DEVICE = "teacher.device=cuda:99"  # loading a teacher there fails on any machine


def text_of(turns: list | None = None, **fields) -> bytes:
    return json.dumps({"conversations": TURNS if turns is None else turns, **fields}).encode()


def cut_png() -> bytes:
    data = picture(3)
    return data[: len(data) - 60]


FOREIGN_SHARD = [
    ("good.json", text_of()),
    ("good.png", picture(0)),
    ("no-json.png", picture(0)),
    ("broken.json", b'{"conversations": ['),
    ("list.json", b"[]"),
    ("silent.json", text_of([])),
    ("nothing.json", b"{}"),
    ("order.json", text_of(TURNS[::-1] + TURNS[::-1])),
    ("question.json", text_of(TURNS[:1])),
    ("question.png", picture(0)),
    ("unasked.json", text_of([{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "no"}])),
    ("unasked.png", picture(0)),
    ("blind.json", text_of()),
    ("junk.json", text_of()),
    ("junk.png", b"not an image"),
    ("cut.json", text_of()),
    ("cut.png", cut_png()),
    ("long.json", text_of([TURNS[0], {"from": "gpt", "value": "no " * 300}])),
    ("long.png", picture(0)),
    ("bomb.json", text_of()),
    ("bomb.png", picture(0, size=(300, 300))),
    ("text.json", text_of([{"from": "human", "value": "Say no."}, {"from": "gpt", "value": "no"}])),
    ("good.json", text_of()),
    ("good.png", picture(0)),
]
REASONS = {
    "no-json": "no JSON file",
    "broken": "broken JSON",
    "list": "JSON is no object",
    "silent": "empty conversations",
    "nothing": "no conversations",
    "order": "no answer",
    "question": "no answer",
    "unasked": "no <image> in the text of an image sample",
    "blind": "<image> in the text, but no image",
    "junk": "not an image",
    "cut": "truncated or damaged image",
    "long": "too long",
    "bomb": "too many pixels",
    "good": "key occurs twice in this shard",
}


@pytest.fixture
def foreign(tmp_path, experiment):
    write_shard(tmp_path / "shards" / "theirs.tar", FOREIGN_SHARD)
    overrides = [f"data.shards={tmp_path}/shards", f"cache.path={tmp_path}/store"]
    return experiment.config(tmp_path, *overrides, "data.max_image_pixels=50000")


def test_every_sample_of_a_foreign_shard_is_cached_or_rejected_with_its_reason(foreign):
    run = cache_teacher(foreign)
    store = Store(foreign.one_cache.path)
    assert sorted(store.keys()) == ["good", "text"]
    assert {key: reason.split(":")[0] for key, reason in store.rejects("theirs")} == REASONS
    assert (run.seen, run.cached, run.rejected) == (16, 2, 14)
    assert verify(foreign.one_cache.path, deep=True).problems == ()


def test_a_sample_is_too_long_by_its_positions_with_vision_tokens(experiment, tmp_path):
    config = experiment.config(tmp_path)
    preparation = load_preparation(config.teacher.model, config.data)
    lengths = {
        sample.key: len(preparation.tokenize(sample.conversations).input_ids)
        for number in range(3)
        for sample in read_shard(experiment.shard(number))
    }
    limit = sorted(lengths.values())[-3]
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", f"data.max_length={limit}")
    cache_teacher(config)
    store = Store(config.one_cache.path)
    assert set(store.keys()) == {key for key, length in lengths.items() if length <= limit}
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert len(reasons) == 2
    assert reasons[0].startswith("too long: ") and reasons[0].endswith(f"data.max_length is {limit}")


def test_on_bad_sample_fail_stops_and_publishes_nothing_of_the_shard(foreign, experiment, tmp_path):
    shutil.copy(experiment.shard(0), tmp_path / "shards" / "a.tar")
    config = foreign.model_copy(update={"data": foreign.data.model_copy(update={"on_bad_sample": "fail"})})
    with pytest.raises(BadSample, match=r"on_bad_sample is fail: sample 'no-json' of .*theirs.tar: no JSON"):
        cache_teacher(config)
    assert Store(config.one_cache.path).parts == ("a",)
    assert not list((tmp_path / "store" / "tmp").iterdir())


def test_a_rerun_writes_nothing_and_loads_no_teacher(experiment, tmp_path):
    before = snapshot(experiment.store)
    run = cache_teacher(experiment.config(tmp_path, NO_SUCH_DEVICE))
    assert (run.parts_written, run.parts_found, run.seen) == (0, 3, 0)
    assert snapshot(experiment.store) == before
    with pytest.raises(ConfigError, match=r"teacher.device: cuda:99 cannot be used here \(.*\); use auto"):
        cache_teacher(experiment.config(tmp_path, NO_SUCH_DEVICE, f"cache.path={tmp_path}/store"))


def test_a_device_that_torch_does_not_know_is_a_sentence(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"teacher.device: 'gpu' is no device; use auto, cpu, cuda"):
        cache_teacher(experiment.config(tmp_path, "teacher.device=gpu", f"cache.path={tmp_path}/store"))


def test_a_layer_that_the_teacher_lacks_is_a_sentence(experiment, tmp_path):
    overrides = ["targets.attention.layers=[0,1,7]", f"cache.path={tmp_path}/store"]
    with pytest.raises(ConfigError, match=r"layer 7, but the teacher has layers 0 to 2"):
        cache_teacher(experiment.config(tmp_path, *overrides))
    assert not (tmp_path / "store").exists()


KILLED = """
import os, signal, sys, time
import pipeline.teacher_cache.progress
from pipeline.config.config import load_config
from pipeline.models.mobilevlm.vision import VisionTower
from pipeline.teacher_cache.teacher import cache_teacher
advance = pipeline.teacher_cache.progress.Progress.advance
def advance_or_die(self, item):
    advance(self, item)
    if self.samples == 8:
        leases = sys.argv[2].removeprefix("cache.path=") + "/leases"
        while len(os.listdir(leases)) > 1:  # the first part is being written beside this
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
pipeline.teacher_cache.progress.Progress.advance = advance_or_die
cache_teacher(load_config(sys.argv[1], sys.argv[2:]))
"""


def test_a_run_killed_in_the_middle_of_a_shard_is_gone_on_with_and_nothing_is_lost(experiment, tmp_path):
    store = tmp_path / "store"
    arguments = [str(experiment.file), f"cache.path={store}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert Store(store).parts == ("shard-000000",)
    kinds = [problem.kind for problem in verify(store, deep=True).problems]
    # Nothing of a part is on the disk before all of it is captured: its lease alone is left.
    assert sorted(kinds) == ["missing part", "missing part", "unfinished part"]
    finished = snapshot(store / "parts" / "shard-000000")

    run = cache_teacher(experiment.config(tmp_path, f"cache.path={store}"))
    assert (run.parts_found, run.parts_written, run.seen) == (1, 2, 8)
    assert snapshot(store / "parts" / "shard-000000") == finished
    assert verify(store, deep=True).problems == ()
    assert summarise(store).content == summarise(experiment.store).content
    undisturbed, found = stored_arrays(experiment.store), stored_arrays(store)
    assert list(found) == list(undisturbed)
    for key, arrays in found.items():
        for name, values in arrays.items():
            for mine, theirs in zip(values, undisturbed[key][name], strict=True):
                assert mine.tobytes() == theirs.tobytes()


def test_a_broken_shard_is_told_and_the_others_are_cached(experiment, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(experiment.shards, shards)
    whole = (shards / "shard-000001.tar").read_bytes()
    (shards / "shard-000001.tar").write_bytes(whole[: len(whole) // 2])
    overrides = [f"data.shards={shards}/*.tar", f"cache.path={tmp_path}/store"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert (run.parts_written, len(run.broken)) == (2, 1)
    assert "shard-000001.tar is" in run.broken[0] and run.broken[0].endswith("make or copy the shard again.")
    with pytest.raises(ShardError, match=r"shard-000001.tar is"):
        cache_teacher(experiment.config(tmp_path, *overrides, "data.on_bad_sample=fail"))

    (shards / "shard-000001.tar").write_bytes(whole)
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert (run.parts_found, run.parts_written, run.broken) == (2, 1, ())
    assert verify(tmp_path / "store", deep=True).problems == ()


# The fingerprint


def changed_weights(experiment, folder: Path) -> list[str]:
    teacher = copy_of_teacher(experiment, folder)
    tensors = weights(teacher)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    return [f"teacher.model={teacher}"]


CHANGES = {
    "teacher": changed_weights,
    "image_preprocessing": lambda experiment, folder: ["data.image_aspect_ratio=square"],
    "template": lambda experiment, folder: ["data.template=plain"],
    "capture": lambda experiment, folder: ["data.max_length=100"],
    "arrays[logits/ids]": lambda experiment, folder: ["targets.logits.top_k=4"],
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_teacher_or_setting_is_refused_before_anything_is_written(field, experiment, tmp_path):
    before = snapshot(experiment.store)
    config = experiment.config(tmp_path, *CHANGES[field](experiment, tmp_path / "teacher"), NO_SUCH_DEVICE)
    with pytest.raises(FingerprintMismatch) as raised:
        cache_teacher(config)
    assert field in [difference.field for difference in raised.value.differences]
    assert f"{field}: " in str(raised.value) and " -> " in str(raised.value)
    assert snapshot(experiment.store) == before


def test_capture_settings_are_shown_as_they_are_where_they_differ(experiment, tmp_path):
    with pytest.raises(
        FingerprintMismatch,
        match=r"\(stored -> mine\): capture: max_length: 200 -> 100; capture: targets.logits.top_k: 8 -> 4; "
        r"capture: targets.vision: \{.*\} -> absent; arrays\[",
    ):
        changes = ["data.max_length=100", "targets.logits.top_k=4", "targets.vision.source=recompute"]
        cache_teacher(experiment.config(tmp_path, *changes))


def test_another_tokenizer_is_refused_before_anything_is_written(experiment, tokenizer_folder, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    shutil.copy(tokenizer_folder / "tokenizer.model", teacher)
    before = snapshot(experiment.store)
    with pytest.raises(
        FingerprintMismatch, match=r"\(stored -> mine\): tokenizer: [0-9a-f]{64} -> [0-9a-f]{64}"
    ):
        cache_teacher(experiment.config(tmp_path, f"teacher.model={teacher}"))
    assert snapshot(experiment.store) == before


def test_a_shard_of_zeros_gets_no_part(experiment, tmp_path):
    shard = tmp_path / "shards" / "shard-000000.tar"
    shard.parent.mkdir()
    shard.write_bytes(bytes(10240))
    config = experiment.config(tmp_path, f"data.shards={shard}", f"cache.path={tmp_path}/store")
    run = cache_teacher(config)
    assert run.parts_written == 0 and Store(tmp_path / "store").parts == ()
    assert run.broken == (f"{shard} holds no sample; make or copy it again, or take it out of data.shards.",)


@pytest.mark.parametrize("in_two_runs", [False, True])
def test_a_key_of_another_shard_is_rejected_where_it_occurs_again(in_two_runs, experiment, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, keys in (("first", ["a", "b"]), ("second", ["b", "c"])):
        members = [
            (f"{key}.{kind}", data)
            for key in keys
            for kind, data in [("json", text_of()), ("png", picture(0))]
        ]
        write_shard(folder / f"{name}.tar", members)
    store_path = f"cache.path={tmp_path}/store"
    config = experiment.config(tmp_path, store_path, f"data.shards={folder}")
    if in_two_runs:
        cache_teacher(experiment.config(tmp_path, store_path, f"data.shards={folder}/first.tar"))
    summary = cache_teacher(config)
    store = Store(config.one_cache.path)
    assert sorted(store.keys()) == ["a", "b", "c"] and summary.rejected == 1
    assert store.rejects("second") == [("b", "key occurs in another shard: the part first holds it")]


def test_a_shard_that_changes_while_it_is_read_gets_no_part(experiment, tmp_path):
    shards = shutil.copytree(experiment.shards, tmp_path / "shards")

    def change(*_):
        """Images of the first batch are read by then, and those of the second are not."""
        for shard in shards.glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))

    overrides = [
        f"cache.path={tmp_path}/store",
        f"data.shards={shards}/shard-000000.tar",
        "teacher.batch_size=1",
    ]
    with before_forward(VisionTower, change):
        run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert run.parts_written == 0 and Store(tmp_path / "store").parts == ()
    assert run.broken[0].endswith(
        "shard-000000.tar changed while it was read: restore it, and run the command again."
    )
