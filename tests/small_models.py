"""Small random models of the real classes."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM

# Four patches a side, pooled to N = 4 vision tokens.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 16,
}
LANGUAGE_MODEL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "mm_projector_grid": 2,
}


def tiny_config(*, tower: dict[str, Any] | None = None, **changes: Any) -> MobileVLMConfig:
    """Return a small config; `changes` replace its fields, `tower` those of the vision tower."""
    return MobileVLMConfig(**{**LANGUAGE_MODEL, "vision_config": TOWER | (tower or {})} | changes)


def tiny_model(*, seed: int = 0, **changes: Any) -> MobileVLMForCausalLM:
    """Return a random model in evaluation mode, with weights so large that attention is not uniform."""
    model = MobileVLMForCausalLM(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.25, generator=generator)
            if "norm.weight" in name or "layernorm.weight" in name:
                parameter.add_(1)
    return model.eval()
