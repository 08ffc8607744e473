"""Stage 2: no teacher is opened, another store is refused before any weight is, a finished run is kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from small_experiment import rewrite_store, shard_members, snapshot, weights, write_shard

from cache import FingerprintMismatch, StoreNotFound
from pipeline.config.config import load_config
from pipeline.config.provenance import finished_identity
from pipeline.distill.student import train_student, training_arguments
from pipeline.distill.training.resuming import HEADS_FILE, one_device_a_process
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.teacher_cache.teacher import cache_teacher


def test_stage_2_opens_no_teacher(experiment, tmp_path):
    teacher = shutil.copytree(experiment.teacher, tmp_path / "teacher")
    overrides = [f"teacher.model={teacher}", f"cache.path={tmp_path}/store"]
    config = experiment.config(tmp_path, *overrides)
    cache_teacher(config)
    shutil.rmtree(teacher)
    model = train_student(config, tmp_path / "run")
    assert model == tmp_path / "run" / "model"
    trained, first = weights(model), weights(experiment.student)
    assert trained.keys() == first.keys()
    assert any(not (trained[name] == first[name]).all() for name in first)


def test_what_a_run_was_made_of_is_saved_beside_it(experiment, tmp_path):
    config = experiment.config(tmp_path, "train.seed=7")
    train_student(config, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert made["config"]["train"]["seed"] == 7 and made["versions"]["torch"]


# The fingerprint


def student_without_weights(experiment, folder: Path) -> Path:
    shutil.copytree(experiment.student, folder)
    (folder / "model.safetensors").unlink()
    return folder


CHANGES = {
    "template": ["data.template=plain"],
    "image_preprocessing": ["data.image_aspect_ratio=square"],
    "capture": ["targets.logits.top_k=4", "data.max_length=100"],
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_store_made_otherwise_is_refused_before_any_weight_is_opened(field, experiment, tmp_path):
    student = student_without_weights(experiment, tmp_path / "student")
    config = experiment.config(tmp_path, *CHANGES[field], f"student.model={student}")
    with pytest.raises(FingerprintMismatch) as raised:
        train_student(config, tmp_path / "run")
    message = str(raised.value)
    assert {difference.field for difference in raised.value.differences} == {field}
    assert f"{field}: " in message and " -> " in message
    assert "set the config to what the store was made with (`alignkd info` shows it)" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_store_says_what_to_run(experiment, tmp_path):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/nowhere")
    with pytest.raises(StoreNotFound, match=r"No teacher store at .*nowhere.*`alignkd teacher-cache`"):
        train_student(config, tmp_path / "run")


# Students that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 600}, r"vocab_size is 600, the teacher of .* has 512"),
        ({"vocab_size": 512, "mm_projector_grid": 1}, r"num_vision_tokens is 1, the teacher of .* has 4"),
    ],
)
def test_a_student_of_another_family_is_refused(changes, message, experiment, tiny_model, tmp_path):
    tiny_model(**changes).save_pretrained(tmp_path / "student")
    shutil.copy(experiment.student / "tokenizer.model", tmp_path / "student")
    config = experiment.config(tmp_path, f"student.model={tmp_path}/student")
    with pytest.raises(ConfigError, match=message):
        train_student(config, tmp_path / "run")


def test_a_student_without_weights_is_a_sentence(experiment, tmp_path):
    student = student_without_weights(experiment, tmp_path / "student")
    with pytest.raises(ConfigError, match=r"student: no weights; expected one of model.safetensors"):
        train_student(experiment.config(tmp_path, f"student.model={student}"), tmp_path / "run")


def test_a_student_that_lacks_a_tensor_is_a_sentence(experiment, tmp_path):
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    tensors = weights(student)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of the model, first 'model.layers.1.mlp.up_proj"):
        train_student(experiment.config(tmp_path, f"student.model={student}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr_scheduler_type=cosinus", "train: transformers refuses these arguments: cosinus is not"),
        ("train.optim=adamm", "train: transformers refuses these arguments: adamm is not"),
        ("train.report_to=paper", "train: transformers refuses these arguments: paper is not supported"),
        ("train.learning_rate=-1", "train: the optimizer cannot be made: Invalid learning rate: -1"),
    ],
)
def test_training_arguments_that_transformers_refuses_are_a_sentence(override, message, experiment, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_student(experiment.config(tmp_path, override), tmp_path / "run")


def test_a_layer_that_the_student_lacks_is_a_sentence(experiment, tmp_path):
    config = experiment.config(tmp_path, "losses.attention.layers=[[0, 0], [1, 2]]")
    with pytest.raises(
        ConfigError, match=r"asks for the student's layer 2, but .*student has layers 0 to 1;"
    ):
        train_student(config, tmp_path / "run")


def test_a_process_that_sees_several_devices_takes_one(experiment, tmp_path):
    arguments = training_arguments(experiment.config(tmp_path), tmp_path)
    arguments._n_gpu = 4
    assert one_device_a_process(arguments).n_gpu == 1
    assert arguments.train_batch_size == arguments.per_device_train_batch_size


def test_a_text_where_a_training_argument_is_a_number_is_refused_at_once(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"train.learning_rate: expected a number, found 'small'"):
        experiment.config(tmp_path, "train.learning_rate=small")


# Finished runs


def test_a_finished_run_is_left_as_it_is(experiment, tmp_path):
    config = experiment.config(tmp_path)
    train_student(config, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    assert train_student(config, tmp_path / "run") == tmp_path / "run" / "model"
    assert snapshot(tmp_path / "run") == before


def test_asking_to_resume_leaves_a_finished_run_as_it_is(experiment, tmp_path):
    train_student(experiment.config(tmp_path), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    train_student(experiment.config(tmp_path, "train.resume_from_checkpoint=true"), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("length", [0, 20])
def test_a_mark_that_cannot_be_read_is_not_taken_for_none(length, experiment, tmp_path):
    config = experiment.config(tmp_path)
    train_student(config, tmp_path / "run")
    mark = tmp_path / "run" / "finished.json"
    whole = finished_identity(mark)
    mark.write_text(mark.read_text()[:length])
    before = snapshot(tmp_path / "run")
    with pytest.raises(PipelineError, match=r"finished\.json cannot be read: what is trained there may be"):
        train_student(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    train_student(config, tmp_path / "run", overwrite=True)
    assert finished_identity(mark) == whole is not None


def other_setting(experiment, config, folder):
    return config.model_copy(update={"train": {**config.train, "learning_rate": 3e-3}})


def other_first_weights(experiment, config, folder):
    student = shutil.copytree(experiment.student, folder / "student", dirs_exist_ok=True)
    tensors = weights(Path(student))
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, Path(student) / "model.safetensors", metadata={"format": "pt"})
    return config


def other_store(experiment, config, folder):
    shutil.rmtree(folder / "store")
    teacher = Path(shutil.copytree(experiment.teacher, folder / "teacher"))
    tensors = weights(teacher)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    cache_teacher(
        config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": str(teacher)})})
    )
    return config


def other_answers(experiment, config, folder):
    """As long as before, so that shards and store look alike."""
    for shard in (folder / "shards").glob("*.tar"):
        members = [(n, data.replace(b"circle", b"square")) for n, data in shard_members(shard)]
        write_shard(shard, members)
    shutil.rmtree(folder / "store")
    cache_teacher(config)
    return config


CHANGED = {
    other_setting: r"train\.learning_rate: 0\.001 -> 0\.003",
    other_first_weights: r"first weights: [0-9a-f]{12} -> [0-9a-f]{12}",
    other_store: r"store\.teacher: [0-9a-f]{12} -> [0-9a-f]{12}",
    other_answers: r"samples\.contents: [0-9a-f]{12} -> [0-9a-f]{12}",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_is_replaced_only_if_asked_when_what_it_depends_on_changed(change, experiment, tmp_path):
    shutil.copytree(experiment.student, tmp_path / "student")
    rewrite_store(experiment.store, tmp_path / "store", lambda key, arrays: arrays)
    shutil.copytree(experiment.shards, tmp_path / "shards")
    overrides = [f"student.model={tmp_path}/student", f"cache.path={tmp_path}/store"]
    config = experiment.config(tmp_path, *overrides, f"data.shards={tmp_path}/shards")
    train_student(config, tmp_path / "run")
    before, kept = weights(tmp_path / "run" / "model"), snapshot(tmp_path / "run")
    other = change(experiment, config, tmp_path)
    with pytest.raises(
        PipelineError, match=rf"run holds a finished training, .*{CHANGED[change]}.* --overwrite"
    ):
        train_student(other, tmp_path / "run")
    assert snapshot(tmp_path / "run") == kept
    train_student(other, tmp_path / "run", overwrite=True)
    after = weights(tmp_path / "run" / "model")
    assert any(not (before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_that_is_saved_has_the_umasks_mode(umask, mode, experiment, tmp_path):
    """safetensors keeps what it writes to its owner; a tokenizer that was private is copied."""
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    (student / "tokenizer.model").chmod(0o600)
    saving = [f"student.model={student}", "train.save_strategy=steps", "train.save_steps=2"]
    before = os.umask(umask)
    try:
        train_student(experiment.config(tmp_path, *saving), tmp_path / "run")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {file.name for file in files} > {
        "model.safetensors",
        HEADS_FILE,
        "tokenizer.model",
        "optimizer.pt",
    }
    assert {str(file): oct(file.stat().st_mode & 0o777) for file in files} == {
        str(file): oct(mode) for file in files
    }


def test_the_result_is_in_mobilevlms_own_layout(experiment, tmp_path):
    model = train_student(experiment.config(tmp_path), tmp_path / "run")
    config = json.loads((model / "config.json").read_text())
    assert config["model_type"] == "mobilevlm" and config["architectures"] == ["MobileLlamaForCausalLM"]
    assert sorted(p.name for p in model.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert MobileVLMForCausalLM.from_pretrained(model).config.vocab_size == 512
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["student"]["model"]
