"""Projected vision features of images, as they go from a tower to a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass(frozen=True)
class ImageFeatures:
    """Projected vision features of some images, in order: 'N D' of each.

    `deepstack` are those that Qwen3-VL adds after its first decoder layers: image -> layer 'N D'. `is_list` says in
    which form the family's forward takes them. `grids` is `image_grid_thw` 'I 3' of Qwen's positions.
    """

    tokens: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...] = ()
    is_list: bool = False
    grids: tuple[Tensor, ...] = ()

    @property
    def flat(self) -> Tensor:
        """The features of all images, one after another: 'G D'."""
        return torch.cat(self.tokens)

    def of(self, chosen: Sequence[int]) -> ImageFeatures:
        """Return those of the images of these numbers, in this order."""
        return ImageFeatures(
            tokens=tuple(self.tokens[n] for n in chosen),
            deepstack=tuple(self.deepstack[n] for n in chosen) if self.deepstack else (),
            is_list=self.is_list,
            grids=tuple(self.grids[n] for n in chosen) if self.grids else (),
        )

    @classmethod
    def joined(cls, images: Sequence[ImageFeatures]) -> ImageFeatures:
        """Return several as one, in order."""
        return cls(
            tokens=tuple(tokens for one in images for tokens in one.tokens),
            deepstack=tuple(layers for one in images for layers in one.deepstack),
            is_list=images[0].is_list,
            grids=tuple(grid for one in images for grid in one.grids),
        )

    def copied(self) -> ImageFeatures:
        """Return copies of the tensors, without gradient."""
        tokens = tuple(tensor.detach().clone() for tensor in self.tokens)
        deepstack = tuple(tuple(tensor.detach().clone() for tensor in layers) for layers in self.deepstack)
        return replace(self, tokens=tokens, deepstack=deepstack)

    def to_output(self) -> EncoderOutput:
        """Return them as the family's `get_image_features` did, for `mm_encoder_outputs`."""
        pooled: Any = list(self.tokens) if self.is_list else self.flat
        output = EncoderOutput(pooler_output=pooled)
        if self.deepstack:
            output.deepstack_features = [list(layer) for layer in zip(*self.deepstack, strict=True)]
        return output


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What a forward reads of `get_image_features`' result, of every family."""

    deepstack_features: Any = None
