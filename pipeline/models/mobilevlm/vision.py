"""The vision tower (CLIP up to the selected layer, or another) and the LDPNetV2 projector of MobileVLM V2.

Modules are named as in the published checkpoint, so that no key is renamed on load or save.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig, EfficientNetLiteTower
from pipeline.shapes import expect_shape

TOWER_LAYER = re.compile(r".*\.encoder\.layers\.(\d+)\.")


class CLIPVisionLayers(nn.Module):
    """The layers of a CLIP vision model under the names of its checkpoints (`pre_layrnorm`, ...).

    `CLIPVisionModel` itself does not fit: in transformers 5 it has no `vision_model.` prefix and renames keys on
    load, but this checkpoint nests them inside another model.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        # It never runs, since MobileVLM takes hidden states before it, but the checkpoint holds it.
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, *, num_layers: int) -> torch.Tensor:
        """Return hidden states after `num_layers` layers, class token first: 'I C Y X' -> 'I M+1 W'."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers[:num_layers]:
            hidden_states = layer(hidden_states, None)
        return hidden_states


class VisionTower(nn.Module):
    """The frozen CLIP tower, from images to patch features of the selected layer. Later layers never run."""

    def __init__(self, config: CLIPVisionConfig, *, select_layer: int, select_feature: str):
        super().__init__()
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature: expected 'patch' or 'cls_patch', found {select_feature!r}"
            )
        self.config = config
        self.num_layers = range(config.num_hidden_layers + 1)[select_layer]
        self.first_token = 1 if select_feature == "patch" else 0
        self.vision_tower: Any = nn.Module()
        self.vision_tower.vision_model = CLIPVisionLayers(config)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return patch features, without gradient as in the original: 'I C Y X' -> 'I M W'."""
        size = self.config.image_size
        expect_shape("pixel_values", pixel_values, f"I {self.config.num_channels} {size} {size}")
        hidden_states = self.vision_tower.vision_model(pixel_values, num_layers=self.num_layers)
        return hidden_states[:, self.first_token :]

    def reads(self, name: str) -> bool:
        """Whether a forward reads the tensor of this name."""
        layer = TOWER_LAYER.match(name)
        return int(layer[1]) < self.num_layers if layer else "post_layernorm" not in name


def build_tower(
    geometry: CLIPVisionConfig | EfficientNetLiteConfig, *, select_layer: int, select_feature: str
) -> nn.Module:
    """Build the tower of a geometry, 'I C Y X' -> 'I M W'. Only a CLIP tower has layers to select."""
    if isinstance(geometry, EfficientNetLiteConfig):
        return EfficientNetLiteTower(geometry)
    geometry._attn_implementation = geometry._attn_implementation or "sdpa"
    return VisionTower(geometry, select_layer=select_layer, select_feature=select_feature)


class _FeatureMLP(nn.Module):
    def __init__(self, tower_width: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(tower_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(features)


class _PositionalConvolution(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return self.peg(grid) + grid


class LDPNetV2(nn.Module):
    """The lightweight downsample projector, from patch features to vision tokens of the language model.

    Two linear layers, average pooling to `grid_size` x `grid_size` tokens, and a depthwise convolution with a
    residual that encodes positions (MobileVLM V2, arXiv 2402.03766, section 3.2).
    """

    def __init__(self, tower_width: int, width: int, *, grid_size: int):
        super().__init__()
        self.grid_size = grid_size
        self.mlp = _FeatureMLP(tower_width, width)
        self.peg = _PositionalConvolution(width)

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        """Project 'I M W' -> 'I N D'. N is grid_size squared; M must be a square number, else `ValueError`."""
        features = self.mlp(patch_features)
        side = round(features.shape[1] ** 0.5)
        if side * side != features.shape[1]:
            raise ValueError(
                f"the projector needs a square grid of patches, found {features.shape[1]} patches"
            )
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        pooled = nn.functional.adaptive_avg_pool2d(grid, self.grid_size)
        return self.peg(pooled).flatten(2).transpose(1, 2)
