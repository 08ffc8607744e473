"""The query attention target: how the position that begins the answer attends to the vision tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cache import ArraySpec
from pipeline.errors import ConfigError
from pipeline.positions import Counts
from pipeline.targets.target import Arrays, Source, Target, TeacherFacts, TeacherForward


class QueryAttentionTarget(Target):
    """Attention of the last prompt position to the vision tokens of one layer, a softmax over these alone.

    A head's values of all images of a sample sum to 1. Vision tokens behind the position are 0. Stored as 'I H N', a
    row for each image.
    """

    source: Source = "cache"
    """`cache` stores it, `recompute` lets stage 2 recompute it with a stub of the teacher.
    [stage 1, stage 2; store, run]"""
    layer: int = Field(ge=0)
    """The teacher's layer, counted from 0 over those that have attention; `suggested`: the one that `alignkd inspect
    layers` found. [layers; stage 1, stage 2; store, run]"""
    heads: Literal["each", "mean"] = "mean"
    """Keep each head, or the mean over heads, each of which sums to 1. [stage 1, stage 2; store, run]"""
    codec: Literal["float32", "float16"] = "float32"
    """How it is stored. [stage 1, stage 2; store, run]"""

    @property
    def deepest(self) -> int:
        return self.layer

    @property
    def first_array(self) -> str:
        return "query_attention"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        if self.layer >= facts.num_layers:
            raise ConfigError(
                f"targets.query_attention.layer asks for layer {self.layer}, "
                f"but the teacher has layers 0 to {facts.num_layers - 1}; ask for one of these"
            )
        return [ArraySpec("query_attention", "I H N", (self._heads(facts), None), "sample", self.codec, {})]

    def of_images(self) -> list[str]:
        return ["query_attention"]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """For each sample a list with float32 '1 H N' of each image."""
        assert forward.query_attention is not None
        rows = self.reduce_heads(forward.query_attention).float().cpu()
        return [
            {"query_attention": [of_image[None].numpy() for of_image in _of_images(row, sizes)]}
            for row, sizes in zip(rows, forward.sizes, strict=True)
        ]

    def reduce_heads(self, attention: Tensor) -> Tensor:
        """Return 'B H J' as `heads` asks: as it is, or with the mean as its one head."""
        return attention.mean(dim=1, keepdim=True) if self.heads == "mean" else attention

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`query_attention`: float32 'B H J', zeros at the padding on the right."""
        # A damaged store may hold no row of an image; the Distiller's check of the number of rows reports it.
        rows = [
            [torch.from_numpy(image[:1].sum(axis=0)) for image in sample["query_attention"]]
            for sample in samples
        ]
        width = max(sum(image.shape[1] for image in images) for images in rows)
        num_heads = max((len(image) for images in rows for image in images), default=1)
        padded = torch.zeros(len(rows), num_heads, width)
        for row, images in zip(padded, rows, strict=True):
            if images:
                row[:, : sum(image.shape[1] for image in images)] = torch.cat(images, dim=1)
        return {"query_attention": padded}

    def rows_in(self, arrays: Arrays) -> int:
        return sum(len(of_image) for of_image in arrays["query_attention"])

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        return {"query_attention": [np.zeros((1, self._heads(facts), size), np.float32) for size in sizes]}

    def _heads(self, facts: TeacherFacts) -> int:
        return 1 if self.heads == "mean" else facts.num_heads

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.images


def _of_images(row: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split 'H J' of a sample into contiguous 'H N' of its images, without the padding."""
    return [of_image.contiguous() for of_image in row[:, : sum(sizes)].split(list(sizes), dim=1)]
