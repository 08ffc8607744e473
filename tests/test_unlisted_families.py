"""Families that are not let in, and folders that mix two models: each ends in a sentence that names the cause."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import family_images
import pytest
import tiny_families
import unlisted_families
from family_experiment import write_config
from safetensors.torch import load_file, save_file

from cache import Store
from cli import main
from pipeline.config.config import DataConfig
from pipeline.conformance.checks import it_generates
from pipeline.conformance.specimen import specimen_of
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import ConfigError
from pipeline.models.families import FAMILIES, Family
from pipeline.models.processors import load_processor

pytestmark = pytest.mark.slow


def alignkd(*arguments: object, capsys) -> tuple[object, str]:
    """Run a command line; return its exit code and all that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("idefics2", "Idefics2Processor does not return the text that stands for an image"),
        ("blip-2", "its decoder, OPTForCausalLM, has no list of layers"),
        ("deepseek_vl", "DeepseekVLForConditionalGeneration of transformers .* has no get_image_features"),
        ("qwen3_vl_moe", "transformers joins, splits or transposes such tensors"),
    ],
)
def test_a_family_that_cannot_be_let_in_is_refused_with_the_reason(family, said, tmp_path, capsys):
    folder = unlisted_families.write_checkpoint(family, tmp_path / "model")
    code, printed = alignkd("models", "check", folder, capsys=capsys)
    assert code == 2
    assert re.search(said, printed.strip().splitlines()[-1])


def test_a_projector_inside_of_the_tower_must_be_named(tmp_path, monkeypatch, capsys):
    """Without a name in the row, all of the vision side would be frozen, and no other check would see it."""
    folder = unlisted_families.write_checkpoint("qwen2_vl", tmp_path / "model")
    code, printed = alignkd("models", "check", folder, capsys=capsys)
    assert code == 1
    assert "FAILED no projector is found" in printed and "blocks, merger" in printed
    monkeypatch.setitem(FAMILIES, "qwen2_vl", Family(trained_in_tower=("merger",)))
    code, printed = alignkd("models", "check", folder, capsys=capsys)
    assert code == 0 and "FAILED" not in printed, printed


def test_a_processor_with_its_video_part_first_has_its_parts_in_place(tmp_path):
    processor = load_processor(unlisted_families.write_checkpoint("video_llava", tmp_path / "model"))
    assert type(processor.image_processor).__name__ == "VideoLlavaImageProcessor"
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token_id


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoints")

    def of(family: str) -> Path:
        known = made / family
        return known if known.is_dir() else tiny_families.write_checkpoint(family, known)

    return of


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_weight_that_is_nan_is_named(family, folders, tmp_path, capsys):
    model = shutil.copytree(folders(family), tmp_path / "model")
    with_nan(model)
    code, printed = alignkd("models", "check", model, capsys=capsys)
    assert code == 1
    assert "FAILED 1 tensors have values that are NaN or infinite" in printed
    assert "layers.1.self_attn.q_proj.weight" in printed


def test_samples_of_a_teacher_with_nan_are_rejected(folders, tmp_path, capsys):
    """The draws from the tail of NaN ended stage 1 with an index error."""
    teacher = shutil.copytree(folders("qwen3_vl"), tmp_path / "teacher")
    with_nan(teacher)
    shards = family_images.write_shards(tmp_path / "shards")
    config = write_config("qwen3_vl", teacher, shards, tmp_path)
    alignkd("teacher-cache", "--config", config, capsys=capsys)
    store = Store(tmp_path / "store")
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert len(store) == 0 and len(reasons) == 6
    assert all(reason.startswith("value that cannot be stored") for reason in reasons)


def test_a_model_that_ends_its_answer_at_once_conforms(folders):
    specimen = specimen_of(folders("llava"))
    config = specimen.vlm.network.generation_config
    for number in range(len(specimen.samples)):
        batch, features = specimen.batch([number]), specimen.features([number])
        made = specimen.vlm.generate(batch, features, max_new_tokens=1, do_sample=False)
        config.eos_token_id = int(made[0, 0])
        assert it_generates(specimen).passed


def test_what_was_found_before_an_error_is_printed(folders, tmp_path, capsys):
    model = shutil.copytree(folders("smolvlm"), tmp_path / "model")
    change(model / "processor_config.json", image_seq_len=5)
    code, printed = alignkd("models", "check", model, capsys=capsys)
    assert code == 2
    assert "ok     the checkpoint has every tensor of the model, and no other" in printed
    assert "for which its processor writes" in printed


def test_a_tokenizer_of_another_model_is_named(folders, tmp_path):
    """Qwen's image token is text in LLaVA's tokenizer, so an image had no vision token."""
    model = shutil.copytree(folders("qwen3_vl"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders("llava") / name, model / name)
    with pytest.raises(
        ConfigError, match=r"among its tokens is no \d+, the image_token_id of config.json; use"
    ):
        load_preparation(str(model), DataConfig(shards="", template="chat"))


def test_a_processor_that_lacks_settings_of_its_model_is_named(folders, tmp_path):
    model = shutil.copytree(folders("smolvlm"), tmp_path / "model")
    change(model / "config.json", model_type="llava")
    with pytest.raises(
        ConfigError, match=r"the processor cannot prepare an image: .*; use the tokenizer and"
    ):
        load_preparation(str(model), DataConfig(shards="", template="chat"))


def test_images_of_a_size_that_the_tower_does_not_take_end_stage_1(folders, tmp_path, capsys):
    teacher = shutil.copytree(folders("gemma3"), tmp_path / "teacher")
    change(teacher / "preprocessor_config.json", size={"height": 24, "width": 24})
    shards = family_images.write_shards(tmp_path / "shards")
    config = write_config("gemma3", teacher, shards, tmp_path)
    said = "the vision tower does not take the images of its processor"
    for command in (["models", "check", teacher], ["teacher-cache", "--config", config]):
        code, printed = alignkd(*command, capsys=capsys)
        assert code == 2 and said in printed.splitlines()[-1]
