"""A checkpoint that cannot be read: each cause its own sentence and remedy, for each reader of the checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from refusals import without_rights
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError, PipelineError
from pipeline.models.configuration import read_config
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.files.checkpoint import Checkpoint, checkpoint_folder
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.targets import LogitsTarget

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
READERS = {
    "tensor by tensor": lambda folder: Checkpoint(str(folder)).digest(),
    "as a teacher": lambda folder: plan_teacher(str(folder), targets={"logits": LogitsTarget()}),
    "as a student": MobileVLMForCausalLM.from_pretrained,
}


@pytest.fixture(params=READERS)
def read(request):
    """Each of those who read a checkpoint."""
    return READERS[request.param]


@pytest.fixture
def folder():
    """An empty folder that another user may enter, too."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def model(experiment, folder):
    """A student, safe to change."""
    shutil.copytree(experiment.student, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def weights(model):
    """The student's tensors, whose file is taken away."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    return tensors


def change_config(model: Path, **fields) -> None:
    file = model / "config.json"
    kept = {k: v for k, v in (json.loads(file.read_text()) | fields).items() if v is not None}
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("model.safetensors", READERS["tensor by tensor"]),
        ("model.safetensors", READERS["as a student"]),
        ("tokenizer.model", load_tokenizer),
        ("config.json", read_config),
    ],
)
def test_a_file_that_this_user_may_not_read(name, reader, model):
    (model / name).chmod(0)
    with (
        without_rights(),
        pytest.raises(PipelineError, match=rf"{name}: permission denied; give this user") as raised,
    ):
        reader(model)
    assert not isinstance(raised.value, ConfigError)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_in_place_of_weights(name, model, weights, read):
    (model / name).write_text(LFS_POINTER)
    with pytest.raises(
        ConfigError, match=rf"{name}: a Git LFS pointer in place of the file; run `git lfs pull`"
    ):
        read(model)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer(name, folder):
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(
        ConfigError, match=rf"{name}: a Git LFS pointer in place of the file; run `git lfs pull`"
    ):
        load_tokenizer(folder)


def test_a_git_lfs_pointer_in_place_of_a_config(folder):
    (folder / "config.json").write_text(LFS_POINTER)
    with pytest.raises(ConfigError, match=r"config.json: a Git LFS pointer in place of the file"):
        read_config(folder)


def test_a_bin_of_before_torch_1_6_is_read(model, weights):
    new = Checkpoint(str(model_of(model, weights, legacy=False))).digest()
    old = Checkpoint(str(model_of(model, weights, legacy=True)))
    assert old.names() == sorted(weights) and old.digest() == new
    student = MobileVLMForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(student[name], weights[name]) for name in weights)


def model_of(model: Path, weights: dict[str, torch.Tensor], *, legacy: bool) -> Path:
    torch.save(weights, model / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return model


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_that_was_cut_is_to_be_copied_again(legacy, model, weights, read):
    file = model_of(model, weights, legacy=legacy) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(
        ConfigError, match=r"pytorch_model.bin: not readable as weights .*; copy or download the"
    ):
        read(model)


class Foreign:
    """What no reader of weights knows."""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_with_more_than_tensors_is_not_unpickled(legacy, model, weights, read):
    model_of(model, weights | {"args": Foreign()}, legacy=legacy)
    with pytest.raises(
        ConfigError, match=r"holds more than tensors, and unpickling that could run any code; .*safetensors$"
    ):
        read(model)


def test_a_bin_with_the_state_dict_inside_is_named(model, weights):
    torch.save({"state_dict": weights, "epoch": 3}, model / "pytorch_model.bin")
    for reader in (READERS["tensor by tensor"], READERS["as a teacher"]):
        with pytest.raises(
            ConfigError, match=r"'state_dict' in it is no tensor but of type dict; save the state"
        ):
            reader(model)


def test_a_file_that_the_index_names_and_that_is_not_there(model, weights, read):
    names = sorted(weights)
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {
        names[-1]: "model-00002-of-00002.safetensors"
    }
    rest = {name: weights[name] for name in names[:-1]}
    save_file(rest, model / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    said = (
        r"model-00002-of-00002.safetensors: no such file, but model.safetensors.index.json names it; download"
    )
    with pytest.raises(ConfigError, match=said):
        read(model)
    (model / "model-00002-of-00002.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(ConfigError, match=said):
        read(model)


def test_a_link_to_nothing_is_no_damaged_file(folder):
    (folder / "tokenizer.json").symlink_to("gone")
    with (
        pytest.raises(ConfigError, match=r"or a link to none; download"),
        named_if_broken(folder / "tokenizer.json"),
    ):
        (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "tower", ["/home/else/clip-vit-large-patch14-336", "./clip", "~/clip", "C:\\models\\clip", "a/b/c"]
)
def test_a_tower_on_another_machine(tower, model, weights):
    said = (
        r"mm_vision_tower: '.*' is no folder here, but perhaps on the machine that wrote the config; set it"
    )
    change_config(model, mm_vision_tower=tower)
    without = {name: tensor for name, tensor in weights.items() if "vision_tower" not in name}
    save_file(without, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=said):
        MobileVLMForCausalLM.from_pretrained(model)
    change_config(model, mm_vision_tower=tower, vision_config=None)
    with pytest.raises(ConfigError, match=rf"config.json: {said}"):
        read_config(model)


def test_a_tower_whose_geometry_and_weights_are_there_may_be_named_anything(model):
    change_config(model, mm_vision_tower="/home/else/clip")
    assert MobileVLMForCausalLM.from_pretrained(model).config.mm_vision_tower == "/home/else/clip"


def test_adapters_without_their_base_model(model, weights, read):
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"})
    )
    save_file({"a": torch.zeros(1)}, model / "adapter_model.safetensors")
    with pytest.raises(
        ConfigError, match=r"LoRA adapters .* without the weights of their base model; merge them"
    ):
        read(model)
    with pytest.raises(ConfigError, match="LoRA adapters"):
        load_tokenizer(model)


def test_a_merged_model_may_have_its_adapters_beside_it(experiment, model):
    (model / "adapter_config.json").write_text("{}")
    assert Checkpoint(str(model)).digest() == Checkpoint(str(experiment.student)).digest()


def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(folder):
    with pytest.raises(
        ConfigError, match=r"no such local folder, found nothing; name a checkpoint's folder$"
    ):
        checkpoint_folder(str(folder / "nowhere"))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no such local folder, found a file; name a checkpoint's folder$"):
        checkpoint_folder(str(folder / "model.safetensors"))
