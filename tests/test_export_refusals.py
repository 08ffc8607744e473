"""What the export commands refuse before a weight is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from phone_models import phone_config, write_phone_model, write_pictures
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import cli
from pipeline.errors import ConfigError
from pipeline.export.executorch.folder import write_executorch
from pipeline.export.gguf.folder import export_gguf
from pipeline.export.hf import export_hf
from pipeline.export.source import Source

SMALL = {"num_hidden_layers": 1, "tower": {"num_hidden_layers": 2}}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_phone_model(tmp_path / "student", **SMALL)


def export(source: Source, folder: Path) -> None:
    export_gguf(source, folder, quant="f16", vision="f16")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", 0, r"the weights have 1 layers \(model.layers.N\), config.json says 0"),
        ("vision_config", {"num_hidden_layers": 1}, r"the weights have 2 layers \(.*\), config.json says 1"),
        ("num_key_value_heads", 0, "a multiple of num_key_value_heads, which is 0"),
    ],
)
def test_a_config_of_another_model_is_refused_and_nothing_is_written(
    field, value, words, checkpoint, tmp_path
):
    config = json.loads((checkpoint / "config.json").read_text())
    config[field] = config[field] | value if isinstance(value, dict) else value
    config["mm_vision_select_layer"] = -1
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        export(Source.of(str(checkpoint)), tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_the_checkpoint_is_no_place_for_an_export(checkpoint):
    source, before = Source.of(str(checkpoint)), sorted(checkpoint.iterdir())
    for write in (export, write_executorch, export_hf):
        with pytest.raises(ConfigError, match="is the checkpoint itself; name another folder"):
            write(source, checkpoint)
    assert sorted(checkpoint.iterdir()) == before


def test_a_file_is_no_folder(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        export_hf(Source.of(str(checkpoint)), tmp_path / "file")
    with pytest.raises(ValueError, match="correct the path or the rights"):
        export(Source.of(str(checkpoint)), tmp_path / "file" / "gguf")


def test_a_checkpoint_has_its_folders_name_from_inside_it_too(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert Source.of(".").name == "student"


@pytest.mark.parametrize("package", ["xllamacpp", "llama_cpp_py_sync", "cffi", "libgguf"])
def test_what_verifying_needs_is_missed_before_anything_is_written(
    package, checkpoint, tmp_path, monkeypatch, capsys
):
    pictures = write_pictures(tmp_path / "pictures")
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "gguf", str(checkpoint), str(tmp_path / "gguf"), "--verify", str(pictures)])
    told = capsys.readouterr().err
    assert f"needs the package {package}" in told and "pip install 'alignkd[" in told
    assert not (tmp_path / "gguf").exists()


def test_too_few_pictures_are_found_before_anything_is_written(checkpoint, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", number=3)
    for kind in ("gguf", "executorch"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", kind, str(checkpoint), str(tmp_path / kind), "--verify", str(pictures)])
        assert "3 images, at least 20 are needed" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()


@pytest.mark.parametrize("changed", ["config", "tokenizer", "image processor", "tower elsewhere"])
def test_an_export_of_the_same_weights_with_another_config_is_another(changed, checkpoint, tmp_path):
    if changed == "tower elsewhere":
        separate_tower(checkpoint, tmp_path / "clip", seed=0)
    export(Source.of(str(checkpoint)), tmp_path / "gguf")
    export(Source.of(str(checkpoint)), tmp_path / "gguf")
    if changed == "config":
        fields = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.01}))
    elif changed == "tokenizer":
        (checkpoint / "tokenizer_config.json").write_text("{}")
    elif changed == "image processor":
        size = {"crop_size": {"height": 96, "width": 96}, "size": {"shortest_edge": 96}}
        (checkpoint / "preprocessor_config.json").write_text(
            json.dumps(size | {"image_mean": [0.1, 0.2, 0.3]})
        )
    else:
        separate_tower(checkpoint, tmp_path / "clip", seed=1)
    with pytest.raises(ConfigError, match=r"holds another export \(other_digest"):
        export(Source.of(str(checkpoint)), tmp_path / "gguf")


def separate_tower(checkpoint: Path, folder: Path, *, seed: int) -> None:
    """Write a CLIP, and let the checkpoint name it in place of the tower that it holds."""
    torch.manual_seed(seed)
    CLIPVisionModel(CLIPVisionConfig(**phone_config(**SMALL).tower.to_dict())).save_pretrained(folder)
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    fields = json.loads((checkpoint / "config.json").read_text()) | {"mm_vision_tower": str(folder)}
    (checkpoint / "config.json").write_text(json.dumps(fields))
