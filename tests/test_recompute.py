"""`source: recompute`: the same targets as from the store, made beside the student by a stub of the same teacher."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small_experiment import copy_of_teacher, losses_of_steps, rewrite_store, weights
from watched import results_of

from cache import FingerprintMismatch, Store
from pipeline.distill.join.recompute import load_recomputed, shares_tower
from pipeline.distill.student import train_student
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm.model import TOWER_PREFIX
from pipeline.models.mobilevlm.vision import VisionTower
from pipeline.teacher_cache.teacher import cache_teacher

BOTH = ["targets.attention.source=recompute", "targets.vision.source=recompute"]
STEPS = ["train.max_steps=4", "train.dataloader_num_workers=0"]


@pytest.fixture(scope="module")
def logits_only(experiment, tmp_path_factory):
    """A store that holds the logits alone, and the overrides that recompute the rest."""
    folder = tmp_path_factory.mktemp("recompute")
    overrides = [*BOTH, f"cache.path={folder}/store"]
    cache_teacher(experiment.config(folder, *overrides))
    return overrides


def test_the_store_holds_what_is_not_recomputed(logits_only, experiment, tmp_path):
    config = experiment.config(tmp_path, *logits_only)
    assert set(Store(config.one_cache.path).manifest.specs) == {
        "input_ids", "labels", "logits/ids", "logits/log_probs", "logits/tail",
    }  # fmt: skip
    assert list(config.targets.cached()) == ["logits"] and list(config.targets.recomputed()) == [
        "attention",
        "vision",
    ]


@pytest.mark.parametrize("recomputed", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "attention", "vision"])
def test_training_has_the_losses_of_the_cached_path(recomputed, experiment, tmp_path):
    cached = experiment.config(tmp_path, *STEPS)
    train_student(cached, tmp_path / "cached")
    overrides = [*recomputed, f"cache.path={tmp_path}/store"]
    config = experiment.config(tmp_path, *STEPS, *overrides)
    cache_teacher(config)
    train_student(config, tmp_path / "recomputed")
    theirs, ours = losses_of_steps(tmp_path / "cached"), losses_of_steps(tmp_path / "recomputed")
    assert len(ours) == 4 and {"loss/attention", "loss/vision_all", "loss/vision_focus"} < set(ours[0])
    for step, expected in zip(ours, theirs, strict=True):
        assert step == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_nothing_of_the_teacher_is_trained_or_saved(logits_only, experiment, tmp_path):
    config = experiment.config(
        tmp_path, *STEPS, *logits_only, "train.save_strategy=steps", "train.save_steps=4"
    )
    train_student(config, tmp_path / "run")
    assert weights(tmp_path / "run" / "model").keys() == weights(experiment.student).keys()
    assert weights(tmp_path / "run" / "checkpoint-4").keys() == weights(experiment.student).keys()


def test_labels_alone_load_no_teacher(logits_only, experiment, tmp_path):
    no_losses = [f"losses.{name}=null" for name in ("attention", "vision_all", "vision_focus", "logits")]
    nowhere = [*logits_only, *no_losses, "teacher.model=nowhere"]
    train_student(experiment.config(tmp_path, *nowhere), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# The stub is of the store's own teacher


def test_another_teacher_is_refused_before_training(logits_only, experiment, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    tensors = weights(teacher)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = experiment.config(tmp_path, *logits_only, f"teacher.model={teacher}")
    with pytest.raises(FingerprintMismatch, match=r"layer 0 attention: [0-9a-f]{64} -> [0-9a-f]{64}\."):
        train_student(config, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_the_stub_does_not_read_may_differ(logits_only, experiment, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    tensors = weights(teacher)
    tensors["lm_head.weight"] += 1
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    config = experiment.config(tmp_path, *logits_only, f"teacher.model={teacher}")
    assert load_recomputed(config, Store(config.one_cache.path), device=torch.device("cpu")) is not None


def test_a_layer_that_stage_1_did_not_look_at_is_refused(experiment, tmp_path):
    attention = ["targets.attention.layers=[0]", "losses.attention.layers=[[0, 0]]", "losses.logits=null"]
    shallow = [*attention, "targets.logits=null", f"cache.path={tmp_path}/store"]
    cache_teacher(experiment.config(tmp_path, *shallow))
    deeper = [
        "targets.attention.layers=[0, 2]", "losses.attention.layers=[[2, 0]]", "losses.logits=null",
        "targets.logits=null", f"cache.path={tmp_path}/store", BOTH[0],
    ]  # fmt: skip
    config = experiment.config(tmp_path, *deeper)
    with pytest.raises(FingerprintMismatch, match="layer 1: not looked at by stage 1 -> "):
        load_recomputed(config, Store(config.one_cache.path), device=torch.device("cpu"))


@pytest.mark.parametrize("field", ["tokenizer", "template", "image_preprocessing"])
@pytest.mark.parametrize("recomputed", ["every sample", "missing samples"])
def test_nothing_is_recomputed_for_a_student_that_reads_in_another_way(
    recomputed, field, experiment, tmp_path
):
    other = {field: "0" * 64}
    if recomputed == "every sample":
        store = rewrite_store(experiment.store, tmp_path / "store", fingerprint=other)
        overrides = [f"cache.path={store}", f"cache.allow_mismatch=[{field}]", *BOTH]
    else:
        store = rewrite_store(experiment.store, tmp_path / "store", fingerprint=other, without=["a1"])
        given = [
            {"path": str(store), "targets": ["attention", "vision"], "allow_mismatch": [field]},
            {"path": str(experiment.store), "targets": ["logits"]},
        ]
        overrides = ["cache=null", f"caches={json.dumps(given)}", "on_missing=recompute"]
    with pytest.raises(
        ConfigError, match=r"attention would be recomputed .* reads text or images in another"
    ):
        train_student(experiment.config(tmp_path, *overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


# One tower for both


def with_another_tower(experiment, folder):
    """The student, one of whose tower's weights is changed."""
    student = shutil.copytree(experiment.student, folder)
    tensors = weights(student)
    name = next(name for name in sorted(tensors) if name.startswith(TOWER_PREFIX) and "fc1.weight" in name)
    tensors[name][0, 0] += 0.5
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    return f"student.model={student}"


def test_one_tower_is_known_by_its_bytes(experiment, tmp_path):
    assert shares_tower(experiment.config(tmp_path))
    assert not shares_tower(experiment.config(tmp_path, with_another_tower(experiment, tmp_path / "student")))


def test_a_student_with_a_tower_of_its_own_has_the_losses_of_the_cached_path_too(
    logits_only, experiment, tmp_path
):
    other = [*STEPS, with_another_tower(experiment, tmp_path / "student")]
    train_student(experiment.config(tmp_path, *other), tmp_path / "cached")
    train_student(experiment.config(tmp_path, *other, *logits_only), tmp_path / "recomputed")
    for step, expected in zip(
        losses_of_steps(tmp_path / "recomputed"), losses_of_steps(tmp_path / "cached"), strict=True
    ):
        assert step == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(("is_shared", "times"), [(True, 1), (False, 2)])
def test_the_tower_runs_once_for_each_distinct_image_and_for_both(
    is_shared, times, logits_only, experiment, tmp_path
):
    held = [*logits_only, "student.patch_feature_cache_bytes=100000000", "train.max_steps=8"]
    if not is_shared:
        held.append(with_another_tower(experiment, tmp_path / "student"))
    with results_of(VisionTower) as features:
        train_student(experiment.config(tmp_path, *held), tmp_path / "run")
    assert sum(map(len, features)) == 8 * times  # the images of the experiment, over two epochs
