"""Positions in a sequence by their role: text, vision tokens, answers, image placeholders.

One placeholder (-200) in `input_ids` stands for the N vision tokens of one image, as in the original code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Slots:
    """Positions by role in the merged sequence, padded with -1 on the right.

    `text`    int64 'B T'  unpadded text positions after the sample's first vision token, ascending
    `vision`  int64 'B J'  positions of the vision tokens, image after image
    """

    text: torch.Tensor
    vision: torch.Tensor


def find_slots(is_vision: torch.Tensor, attention_mask: torch.Tensor) -> Slots:
    """Return positions by role, from bool 'B S' masks of vision tokens and of unpadded positions."""
    after_vision = is_vision.long().cumsum(dim=1) > 0
    return Slots(
        text=_padded_positions(attention_mask & after_vision & ~is_vision),
        vision=_padded_positions(is_vision),
    )


def _padded_positions(chosen: torch.Tensor) -> torch.Tensor:
    """Return the positions of the true entries of each row, ascending, padded with -1: bool 'B S' -> int64 'B T'."""
    counts = chosen.sum(dim=1)
    order = torch.argsort(~chosen, dim=1, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=chosen.device) < counts[:, None], order, -1)


@dataclass(frozen=True)
class Counts:
    """What each sample of a batch has, int64 'B' each, known from ids and labels before any forward.

    `text_rows` are the unpadded text tokens after the sample's first image: the rows T of its attention;
    `attended_images` are the images that some text of their sample follows.
    """

    images: torch.Tensor
    text_rows: torch.Tensor
    answers: torch.Tensor
    attended_images: torch.Tensor

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> Counts:
        """Count in `input_ids`, `attention_mask` and `labels` 'B S'."""
        is_image = batch["input_ids"] == IMAGE_TOKEN_INDEX
        is_text = ~is_image & batch["attention_mask"].bool()
        after_image = is_image.long().cumsum(dim=1) > 0
        before_text = is_text.flip(1).long().cumsum(dim=1).flip(1) > 0
        return cls(
            images=is_image.sum(dim=1),
            text_rows=(is_text & after_image).sum(dim=1),
            answers=(batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1),  # a position predicts the next token
            attended_images=(is_image & before_text).sum(dim=1),
        )
