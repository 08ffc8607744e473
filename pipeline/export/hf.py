"""A checkpoint in the layout that its own family's code loads: MobileVLM V2's, or transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError, writing
from pipeline.export.origin import head, origin_lines
from pipeline.export.source import Source
from pipeline.models.files.checkpoint import copy_processor
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import MobileVLMConfig

BIN = "pytorch_model.bin"
# As published: the original code's AutoTokenizer finds no other sign of which tokenizer it is.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "padding_side": "right",
}
DTYPES = {"source": "auto", "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export_hf(
    source: Source,
    folder: Path,
    *,
    dtype: str = "source",
    as_bin: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Write config, weights, tokenizer and processor, without anything that only a training needs.

    With `as_bin` the weights are one `pytorch_model.bin`, as the original code and llama.cpp's old scripts read them.
    Raises `ConfigError` if the folder holds something and `overwrite` is not given.
    """
    source.check_is_not(folder)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} is not empty; name another folder, or --overwrite to write into it")
    network = load_network(str(source.folder), dtype=DTYPES[dtype])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*.bin*")):
            file.unlink()
        network.save_pretrained(folder)
        copy_processor(source.folder, folder)
        if as_bin:
            _to_bin(network, folder)
        if isinstance(source.config, MobileVLMConfig):
            _as_published(folder, source, say)
        (folder / "README.md").write_text(
            f"{head(source, 'vision-language')}\n# {source.name}\n\n{origin_lines(source)}\n"
        )
    return folder


def _to_bin(network: Any, folder: Path) -> None:
    """Replace safetensors files by a zip of tensors alone: old readers know floats, and no integers."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = {
        name: tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    torch.save(state, folder / BIN)


def _as_published(folder: Path, source: Source, say: Callable[[str], None]) -> None:
    """Write what the original code, on transformers 4.33, reads differently."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    fields |= {
        "torch_dtype": fields.get("dtype") or fields.get("torch_dtype"),
        "mm_hidden_size": source.config.tower.hidden_size,
    }
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if (folder / "tokenizer.model").is_file() and not (folder / TOKENIZER_CONFIG).exists():
        about = TOKENIZER | {"model_max_length": source.config.max_position_embeddings}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    if not fields.get("mm_vision_tower"):
        say(
            f"{file}: mm_vision_tower names no CLIP checkpoint; the original code builds its tower from the name, so "
            "set it to one of this geometry"
        )
