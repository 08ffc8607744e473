"""The study's checkpoints: EfficientNet-Lite0 from its package, and a small MobileVLM from this repository.

All but the tower was learned, and is committed as float16 (`assets/scenes_base`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig
from pipeline.studies.emoji.models import PREPROCESSING
from pipeline.studies.scenes.scenes import IMAGE_SIZE
from pipeline.studies.scenes.tokenizer import build_tokenizer

TOWER = "model.vision_tower."
GRID_SIZE = IMAGE_SIZE // 32  # the tower's stride: a vision token for each of its features
NUM_LAYERS, WIDTH, NUM_HEADS, FEED_FORWARD = 16, 128, 4, 352
# Spread of the initial weights. The word embeddings are as large as what the layers add to them.
EMBEDDING_SPREAD, WEIGHT_SPREAD = 0.1, 0.02
OUTPUT_SPREAD = 2 * WEIGHT_SPREAD * math.sqrt(2 / NUM_LAYERS)
# The tower's features have a spread of 2.4. The projector's first layer starts as if they had one of about 1.
FEATURE_SCALE, PROJECTOR_SPREAD = 0.4, 0.05


def model_config() -> MobileVLMConfig:
    """Return the config of both base models: 16 narrow layers, 81 vision tokens."""
    tokenizer: Any = build_tokenizer()
    return MobileVLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=WEIGHT_SPREAD,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        mm_vision_tower=None,
        vision_tower_type="efficientnet_lite",
        vision_config=EfficientNetLiteConfig(image_size=IMAGE_SIZE),
        mm_projector_grid=GRID_SIZE,
    )


def build_model(tower: Mapping[str, Tensor], *, seed: int = 0) -> MobileVLMForCausalLM:
    """Return an untrained model with this tower."""
    torch.manual_seed(seed)
    model = MobileVLMForCausalLM(model_config())
    model.model.vision_tower.vision_tower.load_state_dict(tower)
    nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_SPREAD)
    layers: Any = model.model.layers
    for layer in layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(output.weight, std=OUTPUT_SPREAD)
    projector: Any = model.model.mm_projector.mlp.mlp
    first, _, second = projector
    nn.init.normal_(first.weight, std=FEATURE_SCALE * PROJECTOR_SPREAD)
    nn.init.normal_(second.weight, std=WEIGHT_SPREAD)
    return model


def learned_of(model: MobileVLMForCausalLM) -> dict[str, Tensor]:
    """Return all weights but the tower's, as float16."""
    return {
        name: value.detach().half().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(TOWER)
    }


def write_learned(model: MobileVLMForCausalLM, file: Path) -> None:
    """Write what a model learned."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(learned_of(model)))


def learned_model(file: Path, tower: Mapping[str, Tensor]) -> MobileVLMForCausalLM:
    """Return a tower with what `write_learned` wrote. Raises `ConfigError` if the file is missing or does not fit."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; train the base models first: `make twig-bases`")
    with named_if_broken(file):
        learned = load_file(file)
    model = build_model(tower)
    own = learned_of(model)
    wrong = [n for n in sorted(own.keys() | learned.keys())
             if n not in own or n not in learned or own[n].shape != learned[n].shape]  # fmt: skip
    if wrong:
        raise ConfigError(
            f"{file}: the tensor {wrong[0]!r} is missing, foreign or of another shape; train the base models again: "
            "`make twig-bases`"
        )
    model.load_state_dict({name: value.float() for name, value in learned.items()}, strict=False)
    return model


def write_checkpoint(model: MobileVLMForCausalLM, folder: Path) -> None:
    """Write a checkpoint folder: weights, config, the study's tokenizer, the tower's preprocessing."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    write_preprocessing(folder)


def write_preprocessing(folder: Path) -> None:
    """Write the tower's preprocessing, at the size of the scenes."""
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    settings = json.loads(PREPROCESSING.read_text()) | sizes
    (folder / PREPROCESSING.name).write_text(json.dumps(settings, indent=2) + "\n")
