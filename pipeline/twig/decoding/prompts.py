"""Prompts of a batch as arguments of a family's forward, and the same with room for new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.families import FAMILIES, Family
from pipeline.positions import IGNORE_INDEX

# Arguments that `generate` prepares for its own loop.
OF_GENERATE = ("past_key_values", "cache_position", "position_ids", "use_cache", "logits_to_keep", "labels")


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left: the forward's arguments, without a cache.

    `input_ids` and `attention_mask` int64 'B P', `is_vision` bool 'B P'.
    """

    inputs: Mapping[str, Any]
    is_vision: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], *, image_token_id: int) -> Prompts:
        """Wrap what a processor returns, or what `generate` gives its decoding method.

        Raises `ConfigError` for prompts that are not ids, or that are padded on the right.
        """
        if inputs.get("inputs_embeds") is not None or inputs.get("input_ids") is None:
            raise ConfigError(
                "decoding with a twig needs input_ids; pass prompts as ids, without inputs_embeds"
            )
        kept = {
            name: value for name, value in inputs.items() if name not in OF_GENERATE and value is not None
        }
        kept.setdefault("attention_mask", torch.ones_like(kept["input_ids"]))
        # `generate` leaves out the grids of images: positions of several axes (Qwen's) cannot be computed again.
        if (positions := inputs.get("position_ids")) is not None and positions.ndim == 3:
            kept["position_ids"] = positions
        if not bool(kept["attention_mask"][:, -1].all()):
            raise ConfigError(
                "prompts are padded on the right, where the answer begins; set the tokenizer's padding_side to left"
            )
        return cls(kept, kept["input_ids"] == image_token_id)

    @property
    def length(self) -> int:
        """P, the positions of the longest prompt."""
        return self.is_vision.shape[1]

    @property
    def rows(self) -> Tensor:
        """The positions 'B P' of the prompts, -1 where padded."""
        mask = self.inputs["attention_mask"].bool()
        return torch.arange(self.length, device=mask.device).expand_as(mask).masked_fill(~mask, -1)

    @property
    def is_plain(self) -> bool:
        """Whether it is one prompt without padding."""
        return len(self.is_vision) == 1 and bool(self.inputs["attention_mask"].all())

    def extended(self, room: int, family: str) -> dict[str, Any]:
        """Return the forward's arguments for prompts that are followed by `room` text tokens."""
        longer = dict(self.inputs)
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        # Any token of text: what a layer gets besides hidden states does not depend on which.
        text = 1 if bool((ids[self.is_vision] == 0).any()) else 0
        new = ids.new_full((len(ids), room), text)
        longer["input_ids"] = torch.cat([ids, new], dim=1)
        longer["attention_mask"] = torch.cat([mask, torch.ones_like(new)], dim=1)
        if (positions := longer.get("position_ids")) is not None:  # 'A B P', as `generate` continues them
            longer["position_ids"] = torch.cat(
                [positions, positions[..., -1:] + 1 + torch.arange(room).to(positions)], dim=2
            )
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in longer:
                longer[name] = torch.cat([longer[name], torch.zeros_like(new).to(longer[name].dtype)], dim=1)
        if "token_type_ids" in longer and (types := FAMILIES.get(family, Family()).token_types) is not None:
            labels = torch.cat([torch.full_like(ids, IGNORE_INDEX), new], dim=1)
            is_vision = torch.cat([self.is_vision, torch.zeros_like(new, dtype=torch.bool)], dim=1)
            longer["token_type_ids"] = types(is_vision, labels)
        return longer
