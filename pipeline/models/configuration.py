"""The config of a checkpoint of any family, read without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from pipeline.errors import ConfigError
from pipeline.models.families import FAMILIES
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.mobilevlm.configuration import USE_ITS_CONFIG, read_mobilevlm_config

# MobileVLM V2's own names: published configs have one of the first two, or no `model_type` at all.
MOBILEVLM = ("mobilevlm", "mobile_llama", "llava_llama", None)


def read_config(folder: Path, *, let_in_only: bool = True) -> PreTrainedConfig:
    """Return the config of a checkpoint folder. Raises `ConfigError` naming the file, or a family that is not let in.

    With `let_in_only=False` any family that transformers loads as an image-text-to-text model is read.
    """
    file = folder / "config.json"
    model_type = _model_type(file)
    if model_type in MOBILEVLM:
        return read_mobilevlm_config(folder)
    if let_in_only and model_type not in FAMILIES:
        raise ConfigError(
            f"{file}: the family {model_type!r} is not let in; run `alignkd models check {folder}` to see whether it "
            f"can be; let in are {', '.join(sorted(FAMILIES))}"
        )
    with named_if_broken(file, kind="a model config", then=USE_ITS_CONFIG):
        config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"{file}: transformers has no image-text-to-text model for {model_type!r}; name the folder of a "
            "vision-language model"
        )
    _check_numbers(file, config)
    return config


def _model_type(file: Path) -> str | None:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; name a folder that holds a checkpoint")
    with named_if_broken(file, kind="a model config", then=USE_ITS_CONFIG):
        fields = json.loads(file.read_text())
        if not isinstance(fields, dict):
            raise ConfigError(f"{file}: not a model config, found {type(fields).__name__}; {USE_ITS_CONFIG}")
        return fields.get("model_type")


def _check_numbers(file: Path, config: Any) -> None:
    text = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_attention_heads"):
        if not isinstance(found := getattr(text, name, None), int) or found < 1:
            raise ConfigError(
                f"{file}: {name} of the language model: expected a number from 1 on, found {found!r}"
            )
    if not isinstance(image_token_of(config), int):
        raise ConfigError(f"{file}: no image_token_id; {USE_ITS_CONFIG}")


def image_token_of(config: Any) -> Any:
    """Return the id that stands for a vision token in `input_ids`."""
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
