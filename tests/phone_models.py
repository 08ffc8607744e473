"""Random MobileVLM V2 of geometries that llama.cpp takes, with the demo's tokenizer, and pictures to ask about."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM

TOKENIZER = Path(__file__).parent.parent / "assets" / "demo_teacher" / "tokenizer.model"
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 4,
    "projection_dim": 64,
    "hidden_act": "quick_gelu",
}


def phone_config(*, tower: dict[str, Any] | None = None, **changes: Any) -> MobileVLMConfig:
    """Return a small config: 24 x 24 patches, pooled to 144 vision tokens, and grouped heads."""
    fields: dict[str, Any] = {
        "vocab_size": 520,  # eight rows more than the tokenizer has pieces
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "mm_vision_tower": None,
        "pad_token_id": 0,
        "vision_config": TOWER | (tower or {}),
    }
    return MobileVLMConfig(**fields | changes)


def write_phone_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint, whose layers matter: their outputs are as large as what is added to them."""
    model = MobileVLMForCausalLM(phone_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else 1.5 / parameter[0].numel() ** 0.5
                parameter.normal_(std=scale, generator=generator)
            else:
                parameter.normal_(std=0.2, generator=generator)
                parameter.add_("norm" in name and name.endswith("weight"))
    model.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    return folder


def write_pictures(folder: Path, *, number: int = 20) -> Path:
    """Write pictures of coloured blocks, most of them no squares."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for n in range(number):
        blocks = generator.integers(0, 256, (6 + n % 3, 6, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((90 + 8 * n, 130), Image.Resampling.NEAREST).save(
            folder / f"{n:02}.png"
        )
    return folder
