"""Loading of a whole model of any family, from which no tensor may be missing."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForImageTextToText

from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import check_loaded, checkpoint_folder, loading
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
    check_loaded(
        name,
        mismatched=info["mismatched_keys"],
        missing=info["missing_keys"],
        unknown=info["unexpected_keys"],
    )
    return network
