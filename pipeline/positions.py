"""Positions in a sequence by their role: text, vision tokens, answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Slots:
    """Positions by role, padded with -1 on the right.

    `text`    int64 'B T'  unpadded text positions after the sample's first vision token, ascending
    `vision`  int64 'B J'  positions of the vision tokens, image after image
    `sizes`   N of each image of the batch, in order: the images of a row share its columns in this order
    """

    text: Tensor
    vision: Tensor
    sizes: tuple[int, ...] = ()

    def by_image(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the values of each image's vision tokens: 'B J' -> for each image of the batch 'N'."""
        # Boolean indexing keeps the batch's order, so the columns of one image lie together.
        return values[self.vision >= 0].split(list(self.sizes))


def find_slots(is_vision: Tensor, attention_mask: Tensor, sizes: Sequence[Sequence[int]] = ()) -> Slots:
    """Return positions by role, from bool 'B S' masks of vision tokens and of unpadded positions.

    `sizes` are the numbers of vision tokens of each sample's images.
    """
    after_vision = is_vision.long().cumsum(dim=1) > 0
    return Slots(
        text=_padded_positions(attention_mask.bool() & after_vision & ~is_vision),
        vision=_padded_positions(is_vision),
        sizes=tuple(size for of_sample in sizes for size in of_sample),
    )


def _padded_positions(chosen: Tensor) -> Tensor:
    """Return the positions of the true entries of each row, ascending, padded with -1: bool 'B S' -> int64 'B T'."""
    counts = chosen.sum(dim=1)
    order = torch.argsort(~chosen, dim=1, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(order.shape[1], device=chosen.device) < counts[:, None], order, -1)


def last_prompt_positions(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the position before each sample's first answer token, int64 'B'; else the last unpadded one."""
    predicts = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    place = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(attention_mask.bool(), place, -1).amax(dim=1)
    return torch.where(predicts.any(dim=1), predicts.int().argmax(dim=1), last)


@dataclass(frozen=True)
class Counts:
    """What each sample of a batch has, int64 'B' each, known before any forward.

    `positions` are the unpadded ones. `vision_tokens` are those of all images of a sample. `text_rows` are the
    unpadded text tokens after the sample's first vision token: the rows T of its attention. `attended_images` are the
    images that some text of their sample follows. `asks_about_images` is 1 where the last prompt position follows a
    vision token, else 0.
    """

    images: Tensor
    vision_tokens: Tensor
    text_rows: Tensor
    answers: Tensor
    attended_images: Tensor
    positions: Tensor
    asks_about_images: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Counts:
        """Count in `is_vision`, `attention_mask` and `labels` 'B S' and in `sizes`, as `pad_tokens` returns them."""
        is_vision, sizes = batch["is_vision"], batch["sizes"]
        is_text = ~is_vision & batch["attention_mask"].bool()
        after_vision = is_vision.long().cumsum(dim=1) > 0
        last_prompt = last_prompt_positions(batch["labels"], batch["attention_mask"])
        return cls(
            images=torch.tensor([len(of_sample) for of_sample in sizes], device=is_vision.device),
            vision_tokens=is_vision.sum(dim=1),
            text_rows=(is_text & after_vision).sum(dim=1),
            answers=(batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1),  # a position predicts the next token
            attended_images=_attended_images(is_vision, is_text, sizes),
            positions=batch["attention_mask"].bool().sum(dim=1),
            asks_about_images=after_vision.gather(1, last_prompt.clamp(min=0)[:, None])[:, 0].long(),
        )


def _attended_images(is_vision: Tensor, is_text: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Return how many images of each sample have some text behind their first vision token: int64 'B'."""
    rows, columns = is_vision.nonzero(as_tuple=True)  # image after image
    lengths = torch.tensor([size for of_sample in sizes for size in of_sample], dtype=torch.long)
    first = (lengths.cumsum(dim=0) - lengths).to(rows.device)
    last_text = torch.where(is_text, torch.arange(is_text.shape[1], device=rows.device), -1).amax(dim=1)
    is_attended = columns[first] < last_text[rows[first]]
    return torch.bincount(rows[first][is_attended], minlength=len(is_vision))
