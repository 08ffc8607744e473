"""One checkpoint in four kinds of files: read alike by the model and tensor by tensor, and written back as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_families
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from pipeline.errors import ConfigError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import SMALL_FILES, Checkpoint, checkpoint_folder
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.model import TOWER_PREFIX
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.targets import LogitsTarget

KINDS = ("bin", "sharded bin", "safetensors", "sharded safetensors")


def write_weights(weights: dict[str, torch.Tensor], folder: Path, kind: str) -> Path:
    """The weights in files of one kind, in two shards if sharded."""
    save, name = (torch.save, "pytorch_model.bin") if "bin" in kind else (save_file, "model.safetensors")
    if "sharded" not in kind:
        save(weights, folder / name)
        return folder
    stem, _, extension = name.partition(".")
    weight_map, names = {}, sorted(weights)
    for number, inside in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05}-of-00002.{extension}"
        save({key: weights[key] for key in inside}, folder / shard)
        weight_map |= dict.fromkeys(inside, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def weights(fixture_folder):
    return torch.load(fixture_folder / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def bare_folder(described_checkpoint, tmp_path):
    """A checkpoint folder with its config, still without weights."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(described_checkpoint / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def logits_of(original_batch):
    """The function that returns a model's logits of the original code's inputs."""

    @torch.no_grad()
    def run(model) -> torch.Tensor:
        return model(**original_batch.inputs()).logits

    return run


@pytest.fixture(scope="module")
def original_logits(original, logits_of):
    return logits_of(original)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_model(kind, bare_folder, weights, logits_of, original_logits):
    model = MobileVLMForCausalLM.from_pretrained(write_weights(weights, bare_folder, kind))
    assert torch.equal(logits_of(model), original_logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_tensors_and_digest(kind, bare_folder, weights, fixture_folder):
    checkpoint = Checkpoint(str(write_weights(weights, bare_folder, kind)))
    assert checkpoint.names() == sorted(weights)
    for name, tensor in checkpoint.tensors(["lm_head.weight", "model.norm.weight"]):
        assert torch.equal(tensor, weights[name])
    assert checkpoint.digest(checkpoint.names()) == Checkpoint(str(fixture_folder)).digest(sorted(weights))


def test_a_digest_depends_on_values_names_types_and_shapes(bare_folder):
    tensor = torch.arange(6, dtype=torch.float32)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 3)},
        {"a": tensor.view(torch.int32)},
        {"a": tensor + 1e-6},
        {"a": tensor.to(torch.bfloat16)},
    ]
    digests = []
    for weights in variants:
        save_file(weights, bare_folder / "model.safetensors")
        digests.append(Checkpoint(str(bare_folder)).digest(weights))
    assert len(set(digests)) == len(variants)


def test_files_are_preferred_as_transformers_prefers_them(bare_folder, weights):
    for kind in ("bin", "sharded bin", "safetensors"):
        changed = weights | {"model.norm.weight": torch.full((48,), float(KINDS.index(kind)))}
        write_weights(changed, bare_folder, kind)
    for remove, found in (("model.safetensors", 2.0), ("pytorch_model.bin", 0.0), (None, 1.0)):
        [(_, norm)] = Checkpoint(str(bare_folder)).tensors(["model.norm.weight"])
        model = MobileVLMForCausalLM.from_pretrained(bare_folder)
        assert norm[0] == model.model.norm.weight[0] == found
        if remove:
            (bare_folder / remove).unlink()


def test_saving_writes_the_published_layout(original, weights, tmp_path, logits_of, original_logits):
    original.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    assert torch.equal(logits_of(MobileVLMForCausalLM.from_pretrained(tmp_path)), original_logits)


def test_saving_keeps_the_fields_that_the_original_code_reads(original, fixture_folder, tmp_path):
    original.save_pretrained(tmp_path)
    published, saved = (
        json.loads((folder / "config.json").read_text()) for folder in (fixture_folder, tmp_path)
    )
    different = {name for name, value in published.items() if saved.get(name, "absent") != value}
    assert different == {"torch_dtype", "transformers_version"}
    assert saved["architectures"] == ["MobileLlamaForCausalLM"] and saved["dtype"] == "float32"


def test_saving_in_shards_and_reloading_changes_nothing(original, tmp_path, logits_of, original_logits):
    original.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits_of(MobileVLMForCausalLM.from_pretrained(tmp_path)), original_logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"mm_projector_grid": 3, "mm_vision_select_layer": -1},
    ],
    ids=str,
)
def test_any_small_model_comes_back_bit_for_bit(changes, tiny_model, make_batch, tmp_path):
    model = tiny_model(**changes)
    batch = make_batch([3, -200, 5], [6], num_vision_tokens=model.config.num_vision_tokens)
    model.save_pretrained(tmp_path)
    again = MobileVLMForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs()).logits, model(**batch.inputs()).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == changes.get("rope_theta", 10000.0)
    assert (config["rope_scaling"] is not None) == ("rope_scaling" in changes)


def test_the_auto_class_finds_the_model(described_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(described_checkpoint)
    assert type(model) is MobileVLMForCausalLM and type(model.config) is MobileVLMConfig


def test_the_checkpoints_own_type_is_kept_unless_another_is_asked(bare_folder, weights):
    write_weights({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, bare_folder, "bin")
    config = json.loads((bare_folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (bare_folder / "config.json").write_text(json.dumps(config))
    assert MobileVLMForCausalLM.from_pretrained(bare_folder).dtype == torch.bfloat16
    model = MobileVLMForCausalLM.from_pretrained(bare_folder, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_buffers_that_older_releases_saved_are_ignored(bare_folder, weights, logits_of, original_logits):
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
        f"{TOWER_PREFIX}vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 577).long(),
    }
    write_weights(weights | old, bare_folder, "bin")
    model, info = MobileVLMForCausalLM.from_pretrained(bare_folder, output_loading_info=True)
    assert not info["unexpected_keys"] and torch.equal(logits_of(model), original_logits)


def test_a_tower_that_the_checkpoint_lacks_comes_from_the_clip_that_it_names(
    fixture_folder, bare_folder, weights, tmp_path, logits_of, original_logits
):
    geometry = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    clip = CLIPVisionModel(CLIPVisionConfig(**geometry))
    inside = f"{TOWER_PREFIX}vision_tower.vision_model."
    tower = {name: tensor for name, tensor in weights.items() if name.startswith(inside)}
    clip.load_state_dict({name.removeprefix(inside): tensor for name, tensor in tower.items()})
    clip.save_pretrained(tmp_path / "clip")
    config = json.loads((fixture_folder / "config.json").read_text())
    config["mm_vision_tower"] = str(tmp_path / "clip")
    (bare_folder / "config.json").write_text(json.dumps(config))
    rest = {name: tensor for name, tensor in weights.items() if name not in tower}
    model = MobileVLMForCausalLM.from_pretrained(write_weights(rest, bare_folder, "safetensors"))
    assert torch.equal(logits_of(model), original_logits)


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.mm_projector.peg.peg.0.bias",
        f"{TOWER_PREFIX}vision_tower.vision_model.pre_layrnorm.bias",
    ],
)
def test_a_missing_tensor_is_one_clear_error(lost, bare_folder, weights):
    write_weights({n: t for n, t in weights.items() if n != lost}, bare_folder, "bin")
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the model, first '{lost}'; use a complete"):
        MobileVLMForCausalLM.from_pretrained(bare_folder)
    with pytest.raises(ConfigError, match=f"the checkpoint has no tensor '{lost}'; use a complete"):
        list(Checkpoint(str(bare_folder)).tensors(["lm_head.weight", lost]))


def test_a_folder_without_weights_says_what_is_expected(bare_folder):
    with pytest.raises(ConfigError, match=r"no weights; expected one of model.safetensors, .*name a folder"):
        Checkpoint(str(bare_folder))


def test_a_name_that_is_no_folder_and_no_hub_id_is_named():
    with pytest.raises(ConfigError, match=r"'no/such/folder': no such local folder, found nothing; name a"):
        checkpoint_folder("no/such/folder")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"garbage that is no file of weights"])
def test_a_broken_file_of_weights_is_named(name, content, bare_folder):
    (bare_folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}: not readable as weights .*copy or download"):
        Checkpoint(str(bare_folder))


@pytest.mark.parametrize("content", ["{", '{"metadata": {}}'])
def test_a_broken_index_is_named(content, bare_folder):
    (bare_folder / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"pytorch_model.bin.index.json: not readable as weights"):
        Checkpoint(str(bare_folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json: not readable as a model config \(.*line 1 column 2"),
        ("[1]", r"config.json: not a model config, found list; use the config.json that belongs"),
        ('{"hidden_size": "wide"}', r"config.json: not readable as a MobileVLM V2 config \(.*hidden_size"),
        ('{"num_attention_heads": 0}', r"num_attention_heads: expected a number from 1 on, found 0"),
        ('{"mm_projector_grid": 0}', r"mm_projector_grid: expected a number from 1 on, found 0"),
        (
            '{"mm_vision_select_layer": -26}',
            r"mm_vision_select_layer: the vision tower has 24 layers, found -26",
        ),
        ('{"vision_config": "large"}', r"vision_config: expected the tower's geometry, found 'large'"),
    ],
)
def test_a_config_that_is_none_is_named(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_a_folder_without_a_config_is_no_model_of_defaults(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config.json: no such file; name a folder that holds a checkpoint$"
    ):
        read_config(tmp_path)


def test_a_config_of_another_model_is_told_by_the_first_tensor_that_differs(original, tmp_path):
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    message = r"tensor '(lm_head|model.embed_tokens).weight' has shape \(.*\), its config.json asks for \("
    with pytest.raises(ConfigError, match=message):
        MobileVLMForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_teacher(
            plan_teacher(str(tmp_path), targets={"logits": LogitsTarget()}),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_small_files_of_a_hub_model_are_all_but_its_weights(family, family_folder):
    files = {file.name for file in family_folder(family).iterdir()}
    taken = set(filter_repo_objects(files, allow_patterns=SMALL_FILES))
    assert files - taken == {"model.safetensors"}
