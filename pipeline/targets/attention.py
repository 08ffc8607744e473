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
    """Text-to-vision attention of the teacher.

    Stored per layer as float 'R H N' with R = images x text rows, image after image, and N of each image.
    """

    source: Source = "cache"
    """`cache` stores it, `recompute` lets stage 2 recompute it with a stub of the teacher.
    [stage 1, stage 2; store, run]"""
    layers: list[int] = Field(default=[0], min_length=1)
    """The teacher's layers, counted from 0 over those that have attention; `suggested`: the one that `alignkd inspect
    layers` found. [layers; stage 1, stage 2; store, run]"""
    heads: Literal["each", "mean"] = "mean"
    """Keep each head, or the mean over heads. [stage 1, stage 2; store, run]"""
    codec: Literal["sqrt_uint8", "fixed_point", "float16", "float32"] = "sqrt_uint8"
    """How it is stored. [stage 1, stage 2; store, run]"""
    step: PowerOfTwo = Field(default=DEFAULT_STEP, exclude_if=lambda step: step == DEFAULT_STEP)
    """Step of the codec `fixed_point`, a power of two. [probability; stage 1, stage 2; store, run]"""

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
        shape = (1 if self.heads == "mean" else facts.num_heads, None)
        options = {"step": self.step} if self.codec == "fixed_point" else {}
        return [
            ArraySpec(_name(layer), "R H N", shape, "sample", self.codec, options) for layer in self.layers
        ]

    def of_images(self) -> list[str]:
        return [_name(layer) for layer in self.layers]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """For each sample and layer a list with float32 'T H N' of each image."""
        rows, columns = (
            (slots >= 0).sum(dim=1).tolist() for slots in (forward.slots.text, forward.slots.vision)
        )
        samples: list[Arrays] = [{} for _ in rows]
        for layer in self.layers:
            attention = self.reduce_heads(forward.attention[layer])
            for sample, block, num_rows, num_columns, sizes in zip(
                samples, attention, rows, columns, forward.sizes, strict=True
            ):
                stored = block[:, :num_rows, :num_columns].transpose(0, 1).float().cpu()  # 'H T J' -> 'T H J'
                sample[_name(layer)] = [
                    of_image.contiguous().numpy() for of_image in stored.split(list(sizes), dim=2)
                ]
        return samples

    def reduce_heads(self, attention: Tensor) -> Tensor:
        """Return 'B H T J' as `heads` asks: as it is, or with the mean as its one head."""
        return attention.mean(dim=1, keepdim=True) if self.heads == "mean" else attention

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`attention`: layer -> float32 'B H T J', padded with zeros."""
        return {
            "attention": {
                layer: _pad_blocks([_by_text_row(s[_name(layer)]) for s in samples]) for layer in self.layers
            }
        }

    def rows_in(self, arrays: Arrays) -> int:
        return sum(len(of_image) for of_image in arrays[self.first_array])

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        num_heads, num_rows = 1 if self.heads == "mean" else facts.num_heads, int(counts.text_rows)
        return {
            _name(layer): [np.zeros((num_rows, num_heads, size), np.float32) for size in sizes]
            for layer in self.layers
        }

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.images * counts.text_rows


def _name(layer: int) -> str:
    return f"attention/layer_{layer}"


def _by_text_row(images: Sequence[np.ndarray]) -> Tensor:
    """Return 'H T J' of a sample's stored 'T H N' of each image."""
    if not images:
        return torch.zeros(1, 0, 0)
    # A damaged store may hold fewer rows of one image; the Distiller's check of the number of rows reports it.
    num_rows = min(map(len, images))
    return torch.cat([torch.from_numpy(block[:num_rows]) for block in images], dim=2).transpose(0, 1)


def _pad_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """'H T J' of each sample -> 'B H T J', zeros where a sample has fewer rows or columns."""
    heads, rows, columns = (max(block.shape[axis] for block in blocks) for axis in (0, 1, 2))
    padded = torch.zeros(len(blocks), heads, rows, columns)
    for index, block in enumerate(blocks):
        padded[index, : block.shape[0], : block.shape[1], : block.shape[2]] = block
    return padded
