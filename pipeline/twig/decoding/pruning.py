"""Pruning of vision tokens: which stay after layer K, and rows without those that go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_tokens(scores: Tensor, vision: Tensor, counts: Sequence[int], length: int) -> Tensor:
    """Return the vision tokens that stay, bool 'B P': of each sample the `counts` with the largest scores.

    `scores` float32 'B J' belong to the positions `vision` 'B J' (-1: none) of `length` P. Equal scores: the first
    ones stay, so that the result does not depend on the machine.
    """
    real = scores.masked_fill(vision < 0, float("-inf"))
    order = real.sort(dim=1, descending=True, stable=True).indices
    wanted = torch.tensor(counts, device=scores.device)[:, None]
    is_kept = (torch.arange(order.shape[1], device=scores.device) < wanted) & (vision.gather(1, order) >= 0)
    places = vision.gather(1, order).masked_fill(~is_kept, length)  # one more column takes what goes
    return torch.zeros(len(scores), length + 1, dtype=torch.bool, device=scores.device).scatter_(
        1, places, True
    )[:, :length]


def compacted(hidden: Tensor, rows: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that stay, bool 'B Q', in their order, padded on the left: 'B Q D', 'B Q' -> 'B R D', 'B R'."""
    counts = stays.sum(dim=1)
    width = int(counts.max())
    order = stays.long().argsort(dim=1, stable=True)[:, stays.shape[1] - width :]
    is_real = torch.arange(width, device=rows.device) >= width - counts[:, None]
    return (
        hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[2])),
        rows.gather(1, order).masked_fill(~is_real, -1),
    )
