"""Loading of a whole model of any family, from which no tensor may be missing."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForImageTextToText

from pipeline.errors import ConfigError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder, loading
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM


def load_network(name: str, *, dtype: Any, let_in_only: bool = True) -> Any:
    """Load a checkpoint, a folder or hub id, by transformers.

    Raises `ConfigError` naming the first tensor that is missing, unknown or of another shape: none stays random.
    """
    folder = checkpoint_folder(str(name))
    config = read_config(folder, let_in_only=let_in_only)
    if isinstance(config, MobileVLMConfig):
        return MobileVLMForCausalLM.from_pretrained(name, dtype=dtype)
    with loading(name):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # checked below
        )
    network, info = loaded
    for tensor, found, expected in sorted(info["mismatched_keys"]):
        raise ConfigError(
            f"{name}: tensor {tensor!r} has shape {tuple(found)}, its config.json asks for {tuple(expected)}; "
            "use the config.json that belongs to the checkpoint"
        )
    if missing := sorted(info["missing_keys"]):
        unknown = sorted(info["unexpected_keys"])
        also = (
            f", and has {len(unknown)} that the model does not know, first {unknown[0]!r}" if unknown else ""
        )
        raise ConfigError(
            f"{name}: the checkpoint lacks {len(missing)} tensors of the model, first {missing[0]!r}{also}; use a "
            "complete checkpoint with its own config.json"
        )
    if unknown := sorted(info["unexpected_keys"]):
        raise ConfigError(
            f"{name}: the checkpoint has {len(unknown)} tensors that the model does not know, first {unknown[0]!r}; "
            "use the config.json that belongs to the checkpoint"
        )
    return network
