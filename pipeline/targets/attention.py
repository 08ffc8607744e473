"""The attention target: text-to-vision attention of the teacher's shallow layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache import ArraySpec
from pipeline.errors import ConfigError
from pipeline.positions import Counts
from pipeline.settings import PowerOfTwo
from pipeline.targets.target import Arrays, Source, Target, TeacherFacts, TeacherForward

DEFAULT_STEP = 2**-12


class AttentionTarget(Target):
    """Text-to-vision attention of the teacher's `layers`: of each head, or the mean over heads.

    Stored per layer as float 'R H N' with R = images x text rows, image after image; `step` belongs to `fixed_point`.
    """

    source: Source = "cache"
    layers: list[int] = Field(default=[0], min_length=1)
    heads: Literal["each", "mean"] = "mean"
    codec: Literal["sqrt_uint8", "fixed_point", "float16", "float32"] = "sqrt_uint8"
    step: PowerOfTwo = Field(default=DEFAULT_STEP, exclude_if=lambda step: step == DEFAULT_STEP)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: list[int]) -> list[int]:
        if layers != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"layers must ascend from 0 on, without repeats; found {layers}")
        return layers

    @property
    def deepest(self) -> int:
        return self.layers[-1]

    @property
    def first_array(self) -> str:
        return _name(self.layers[0])

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        if self.deepest >= facts.num_layers:
            raise ConfigError(
                f"targets.attention.layers asks for layer {self.deepest}, "
                f"but the teacher has layers 0 to {facts.num_layers - 1}; ask for one of these"
            )
        shape = (1 if self.heads == "mean" else facts.num_heads, facts.num_vision_tokens)
        options = {"step": self.step} if self.codec == "fixed_point" else {}
        return [
            ArraySpec(_name(layer), "R H N", shape, "sample", self.codec, options) for layer in self.layers
        ]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        rows, columns = (
            (slots >= 0).sum(dim=1).tolist() for slots in (forward.slots.text, forward.slots.vision)
        )
        samples: list[Arrays] = [{} for _ in rows]
        for layer in self.layers:
            attention = self.reduce_heads(forward.attention[layer])
            for sample, block, num_rows, num_columns in zip(samples, attention, rows, columns, strict=True):
                by_image = block[:, :num_rows, :num_columns].unflatten(2, (-1, forward.num_vision_tokens))
                stored = by_image.permute(2, 1, 0, 3).flatten(0, 1)  # 'H T I N' -> 'I T H N' -> 'R H N'
                sample[_name(layer)] = stored.float().cpu().numpy()
        return samples

    def reduce_heads(self, attention: Tensor) -> Tensor:
        """Return 'B H T J' as `heads` asks: as it is, or with the mean as its one head."""
        return attention.mean(dim=1, keepdim=True) if self.heads == "mean" else attention

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`attention`: layer -> float32 'B H T J', padded with zeros."""
        return {
            "attention": {
                layer: _pad_blocks([_by_text_row(s[_name(layer)], int(s["num_images"])) for s in samples])
                for layer in self.layers
            }
        }

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.images * counts.text_rows


def _name(layer: int) -> str:
    return f"attention/layer_{layer}"


def _by_text_row(stored: np.ndarray, num_images: int) -> Tensor:
    """Return 'H T J' of a sample's stored 'R H N'. Rows beyond a whole number of images are dropped: the Distiller's
    check of the number of rows reports them."""
    num_rows, num_heads, num_vision_tokens = stored.shape
    if num_images == 0:
        return torch.zeros(num_heads, 0, 0)
    whole = stored[: num_rows // num_images * num_images]
    by_image = torch.from_numpy(whole).view(num_images, -1, num_heads, num_vision_tokens)
    return by_image.permute(2, 1, 0, 3).flatten(2)


def _pad_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """'H T J' of each sample -> 'B H T J', zeros where a sample has fewer rows or columns."""
    rows, columns = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    padded = torch.zeros(len(blocks), blocks[0].shape[0], rows, columns)
    for index, block in enumerate(blocks):
        padded[index, :, : block.shape[1], : block.shape[2]] = block
    return padded
