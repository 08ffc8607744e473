"""Stage 1: every sample is cached or rejected, a rerun does nothing, and what is stored is the teacher's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_experiment import (
    RARE,
    picture,
    shard_members,
    snapshot,
    stored_arrays,
    training_records,
    weights,
    write_shard,
)

from cache import FingerprintMismatch, Store, summarise, verify
from pipeline.errors import BadSample, ConfigError, ShardError
from pipeline.inputs import Preparation
from pipeline.models.merge import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.shards import read_shard
from pipeline.teacher import cache_teacher

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
    store = Store(foreign.cache.path)
    assert sorted(store.keys()) == ["good", "text"]
    assert {key: reason.split(":")[0] for key, reason in store.rejects("theirs")} == REASONS
    assert (run.seen, run.cached, run.rejected) == (16, 2, 14)
    assert verify(foreign.cache.path, deep=True).problems == ()


def test_a_sample_is_too_long_by_its_positions_with_vision_tokens(experiment, tmp_path):
    config = experiment.config(tmp_path)
    preparation = Preparation.of(config.teacher.model, config.data)
    lengths = {
        sample.key: preparation.merged_length(preparation.tokenize(sample.conversations).input_ids)
        for number in range(3)
        for sample in read_shard(experiment.shard(number))
    }
    limit = sorted(lengths.values())[-3]
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", f"data.max_length={limit}")
    cache_teacher(config)
    store = Store(config.cache.path)
    assert set(store.keys()) == {key for key, length in lengths.items() if length <= limit}
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert len(reasons) == 2
    assert reasons[0].startswith("too long: ") and reasons[0].endswith(f"data.max_length is {limit}")


def test_on_bad_sample_fail_stops_and_publishes_nothing_of_the_shard(foreign, experiment, tmp_path):
    shutil.copy(experiment.shard(0), tmp_path / "shards" / "a.tar")
    config = foreign.model_copy(update={"data": foreign.data.model_copy(update={"on_bad_sample": "fail"})})
    with pytest.raises(BadSample, match=r"on_bad_sample is fail: sample 'no-json' of .*theirs.tar: no JSON"):
        cache_teacher(config)
    assert Store(config.cache.path).parts == ("a",)
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
import os, signal, sys
import pipeline.progress
from pipeline.config import load_config
from pipeline.teacher import cache_teacher
advance = pipeline.progress.Progress.advance
def advance_or_die(self, item):
    advance(self, item)
    if self.samples == 8:
        os.kill(os.getpid(), signal.SIGKILL)
pipeline.progress.Progress.advance = advance_or_die
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
    assert sorted(kinds) == ["missing part", "missing part", "unfinished part"]
    finished = snapshot(store / "parts" / "shard-000000")

    run = cache_teacher(experiment.config(tmp_path, f"cache.path={store}"))
    assert (run.parts_found, run.parts_written, run.seen) == (1, 2, 8)
    assert snapshot(store / "parts" / "shard-000000") == finished
    assert verify(store, deep=True).problems == ()
    undisturbed, found = stored_arrays(experiment.store), stored_arrays(store)
    assert list(found) == list(undisturbed)
    for key, arrays in found.items():
        assert {n: a.tobytes() for n, a in arrays.items()} == {
            n: a.tobytes() for n, a in undisturbed[key].items()
        }


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


def samples_of(experiment) -> dict[str, list[tuple[str, bytes]]]:
    members: dict[str, list[tuple[str, bytes]]] = {}
    for number in range(3):
        for name, data in shard_members(experiment.shard(number)):
            members.setdefault(name.split(".")[0], []).append((name, data))
    return members


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch_size=st.integers(1, 7))
def test_stored_values_do_not_depend_on_batch_size_or_neighbours(
    experiment, tmp_path_factory, data, batch_size
):
    samples = samples_of(experiment)
    order = data.draw(st.permutations(sorted(samples)))[: data.draw(st.integers(1, len(samples)))]
    folder = tmp_path_factory.mktemp("neighbours")
    write_shard(folder / "one.tar", [member for key in order for member in samples[key]])
    overrides = [f"data.shards={folder}", f"cache.path={folder}/store", f"teacher.batch_size={batch_size}"]
    cache_teacher(experiment.config(folder, *overrides))
    reference, found = stored_arrays(experiment.store), stored_arrays(folder / "store")
    assert list(found) == order
    for key in order:
        for name, values in found[key].items():
            # Logits are kept in float16: two values on both sides of a rounding differ by one step.
            relative = 2**-10 if name.startswith("logits/") else 0
            np.testing.assert_allclose(values, reference[key][name], atol=1e-5, rtol=relative, err_msg=name)


def test_an_image_is_stored_once_within_a_shard(experiment):
    summary = summarise(experiment.store)
    vision = next(array for array in summary.arrays if array.name == "vision")
    per_shard = []
    for number in range(3):
        samples = read_shard(experiment.shard(number))
        per_shard.append([digest for sample in samples for digest in sample.image_digests])
    assert vision.rows == summary.distinct_images == sum(len(set(digests)) for digests in per_shard)
    assert summary.image_references == sum(map(len, per_shard)) > summary.distinct_images


# What is stored is what transformers computes


@pytest.fixture(scope="module")
def eager(experiment) -> MobileVLMForCausalLM:
    model = MobileVLMForCausalLM.from_pretrained(experiment.teacher, attn_implementation="eager")
    return model.float().eval()


def whole_sequences(experiment, eager):
    """Of every sample alone: key, role of each merged position, labels, logits and eager attention."""
    config = experiment.config(experiment.file.parent)
    preparation = Preparation.of(config.teacher.model, config.data)
    for number in range(3):
        for sample in read_shard(experiment.shard(number)):
            tokens = preparation.tokenize(sample.conversations)
            roles, labels = [], []
            for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
                width = 4 if token == IMAGE_TOKEN_INDEX else 1
                roles += ["vision" if width == 4 else "text"] * width
                labels += [label] * width
            pixels = [preparation.preprocess(image) for image in sample.images]
            with torch.no_grad():
                vision = eager.encode_images(torch.stack(pixels)) if pixels else None
                merged = eager.merge_inputs(torch.tensor([tokens.input_ids]), vision)
                outputs = eager.model(inputs_embeds=merged.inputs_embeds, output_attentions=True)
                logits = eager.lm_head(outputs.last_hidden_state)[0]
            yield sample.key, roles, labels, logits, outputs.attentions, vision


def test_stored_attention_and_vision_are_those_of_eager_attention(experiment, eager):
    store = Store(experiment.store)
    for key, roles, _, _, attentions, vision in whole_sequences(experiment, eager):
        columns = [n for n, role in enumerate(roles) if role == "vision"]
        rows = [n for n, role in enumerate(roles) if role == "text" and columns and n > columns[0]]
        names = ["attention/layer_0", "attention/layer_1", "vision"]
        stored = store.read(key, names)
        for layer in (0, 1):
            # R H N: image after image, each with all rows.
            expected = [
                attentions[layer][0][:, row, columns[4 * image : 4 * image + 4]].numpy()
                for image in range(len(columns) // 4)
                for row in rows
            ]
            found = stored[f"attention/layer_{layer}"]
            assert found.shape == (len(expected), 4, 4)
            if expected:
                np.testing.assert_allclose(found, np.stack(expected), atol=1e-5, err_msg=key)
        if vision is not None:
            np.testing.assert_allclose(stored["vision"], vision.transpose(1, 2).numpy(), atol=1e-5)


def test_stored_logits_are_the_top_of_the_full_distribution_and_the_mass_of_the_rest(experiment, eager):
    store = Store(experiment.store)
    for key, _, labels, logits, _, _ in whole_sequences(experiment, eager):
        predicts = [n - 1 for n, label in enumerate(labels) if label != IGNORE_INDEX]
        full = logits[predicts].double().log_softmax(dim=-1)
        stored = store.read(key, ["logits/ids", "logits/log_probs", "logits/tail"])
        ids = torch.from_numpy(stored["logits/ids"].astype(np.int64))
        assert ids.shape == (len(predicts), 8)
        torch.testing.assert_close(full.topk(8).indices, ids)
        rest = full.exp().scatter(1, ids, 0).sum(dim=1).log().clamp(min=-30)
        for expected, name in ((full.gather(1, ids), "logits/log_probs"), (rest, "logits/tail")):
            np.testing.assert_allclose(stored[name], expected.clamp(min=-30).numpy(), rtol=2**-10, atol=1e-5)


def test_a_stub_stores_the_same_attention_and_vision_as_the_whole_teacher(experiment, tmp_path):
    overrides = ["targets.logits=null", "losses.logits=null", f"cache.path={tmp_path}/store"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    manifest, whole = Store(tmp_path / "store").manifest, Store(experiment.store).manifest
    assert manifest.teacher["is_stub"] and not whole.teacher["is_stub"]
    assert manifest.teacher["num_tensors_used"] < whole.teacher["num_tensors_used"]
    reference = stored_arrays(experiment.store)
    for key, arrays in stored_arrays(tmp_path / "store").items():
        assert "logits/ids" not in arrays and "vision" in arrays
        for name, values in arrays.items():
            np.testing.assert_allclose(values, reference[key][name], atol=1e-6, err_msg=f"{key} {name}")


# Values that cannot be stored


def copy_of_teacher(experiment, folder: Path) -> Path:
    return Path(shutil.copytree(experiment.teacher, folder))


def test_a_sample_whose_values_are_not_finite_is_rejected_with_the_reason(experiment, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    ids = {key: set(arrays["input_ids"].tolist()) for key, arrays in stored_arrays(experiment.store).items()}
    only_rare = ids["rare"] - set().union(*(found for key, found in ids.items() if key != "rare"))
    assert only_rare, f"no token of {RARE!r} is rare"
    tensors = weights(teacher)
    tensors["model.embed_tokens.weight"][sorted(only_rare)[0]] = float("nan")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"teacher.model={teacher}", f"cache.path={tmp_path}/store"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert (run.cached, run.rejected) == (len(training_records()) - 1, 1)
    store = Store(tmp_path / "store")
    rejects = [reject for part in store.parts for reject in store.rejects(part)]
    assert [key for key, _ in rejects] == ["rare"]
    assert rejects[0][1].startswith("value that cannot be stored: Array 'attention/layer_0'")
    assert "not finite" in rejects[0][1]
    assert verify(tmp_path / "store", deep=True).problems == ()


def test_features_beyond_a_codec_reject_the_image_samples_and_keep_the_text(experiment, tmp_path):
    overrides = ["targets.vision.codec=fixed_point", f"targets.vision.step={2**-40}"]
    run = cache_teacher(experiment.config(tmp_path, *overrides, f"cache.path={tmp_path}/store"))
    assert (run.cached, run.rejected) == (2, len(training_records()) - 2)
    store = Store(tmp_path / "store")
    assert sorted(store.keys()) == ["t0", "t1"]
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert all(reason.startswith("value that cannot be stored: Array 'vision': value ") for reason in reasons)
    assert all("use a larger step or float16" in reason for reason in reasons)


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
    assert f"{field}: stored " in str(raised.value) and ", mine " in str(raised.value)
    assert snapshot(experiment.store) == before


def test_another_tokenizer_is_refused_before_anything_is_written(experiment, tokenizer_folder, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    shutil.copy(tokenizer_folder / "tokenizer.model", teacher)
    before = snapshot(experiment.store)
    with pytest.raises(
        FingerprintMismatch, match=r"asked: tokenizer: stored [0-9a-f]{64}, mine [0-9a-f]{64}"
    ):
        cache_teacher(experiment.config(tmp_path, f"teacher.model={teacher}"))
    assert snapshot(experiment.store) == before
