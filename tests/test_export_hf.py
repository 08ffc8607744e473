"""Checkpoints written for their family's own code: MobileVLM V2 as published, others as transformers writes them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from phone_models import write_phone_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import cli
from pipeline.errors import ConfigError
from pipeline.export.hf import export_hf
from pipeline.export.source import Source
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.processors import load_processor

pytestmark = pytest.mark.slow


def test_the_original_codes_checkpoint_is_written_with_its_names_its_config_and_its_outputs(
    described_checkpoint, original, original_batch, tmp_path
):
    folder = export_hf(Source.of(str(described_checkpoint)), tmp_path / "out")
    before = dict(
        Checkpoint(str(described_checkpoint)).tensors(Checkpoint(str(described_checkpoint)).names())
    )
    after = load_file(folder / "model.safetensors")
    assert {n for n in before if "position_ids" not in n and "inv_freq" not in n} == set(after)
    assert all(torch.equal(after[name], before[name]) for name in after)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MobileLlamaForCausalLM"] and config["model_type"] == "mobilevlm"
    for name in ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "rope_theta", "torch_dtype"):
        assert config[name] is not None, name
    again = MobileVLMForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(
            again(**original_batch.inputs()).logits, original(**original_batch.inputs()).logits
        )


def test_the_old_layout_is_one_file_of_floats_that_holds_the_same_tensors(tmp_path):
    source = Source.of(str(write_phone_model(tmp_path / "student")))
    old = export_hf(source, tmp_path / "old", as_bin=True, dtype="float16")
    tensors = torch.load(old / "pytorch_model.bin", weights_only=True)
    new = load_file(export_hf(source, tmp_path / "new", dtype="float16") / "model.safetensors")
    assert not list(old.glob("*.safetensors*"))
    assert set(tensors) == set(new) and all(torch.equal(tensors[name], new[name]) for name in new)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert Source.of(str(old)).digest == Source.of(str(tmp_path / "new")).digest
    assert (old / "tokenizer.model").is_file()
    about = json.loads((old / "tokenizer_config.json").read_text())
    assert (
        about["tokenizer_class"] == "LlamaTokenizer" and about["model_max_length"] == 1024 and about["legacy"]
    )


@pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_5_vl"])
def test_other_families_are_written_as_transformers_does_with_their_processor(
    family, family_folder, tmp_path
):
    folder = export_hf(Source.of(str(family_folder(family))), tmp_path / "out")
    theirs = AutoModelForImageTextToText.from_pretrained(family_folder(family)).state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_processor(folder).to_dict() == load_processor(family_folder(family)).to_dict()


def test_a_folder_that_holds_something_is_not_written_into_unless_asked(tmp_path):
    student = write_phone_model(tmp_path / "student")
    with pytest.raises(ConfigError, match="is the checkpoint itself"):
        export_hf(Source.of(str(student)), student, overwrite=True)
    folder = shutil.copytree(student, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        export_hf(Source.of(str(student)), folder)
    export_hf(Source.of(str(student)), folder, overwrite=True, as_bin=True)
    assert not list(folder.glob("*.safetensors"))


def test_the_command_says_that_the_original_code_needs_a_tower_by_name(tmp_path, capsys):
    student = write_phone_model(tmp_path / "student")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "hf", str(student), str(tmp_path / "out"), "--license", "mit"])
    assert "mm_vision_tower names no CLIP checkpoint" in capsys.readouterr().err
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
