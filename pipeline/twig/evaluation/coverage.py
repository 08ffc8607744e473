"""Rules that keep vision tokens from all over the image: evenly spread, or unlike each other.

Each returns the place of a token in an order, as a score: the first R of the order are kept, whatever R is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def even_order(vision: Tensor) -> Tensor:
    """Return scores 'B J' of an order in which the first R tokens are spread evenly over the sequence, for any R.

    The order is that of the bits of a token's place read backwards (van der Corput's sequence).
    """
    scores = torch.zeros(vision.shape, device=vision.device)
    for row, count in zip(scores, (vision >= 0).sum(dim=1).tolist(), strict=True):
        bits = max(1, (count - 1).bit_length())
        backwards = [int(f"{n:0{bits}b}"[::-1], 2) for n in range(2**bits)]
        order = [place for place in backwards if place < count]
        row[order] = torch.arange(count, 0, -1, dtype=torch.float32, device=vision.device)
    return scores


def diverse_order(states: Tensor, vision: Tensor, first: Tensor | None = None) -> Tensor:
    """Return scores 'B J' of an order in which each token is the one least like all before it.

    `states` 'B S D' are compared by their cosines, at the positions `vision` 'B J' (-1: none). `first` 'B J' are
    scores whose largest ones take every second place.
    """
    real = vision >= 0
    columns = vision.clamp(min=0)[..., None].expand(-1, -1, states.shape[2])
    tokens = torch.nn.functional.normalize(states.gather(1, columns).float(), dim=2)
    likeness = tokens @ tokens.transpose(1, 2)
    mean = torch.nn.functional.normalize((tokens * real[..., None]).sum(dim=1), dim=1)
    # The highest likeness to what is chosen; at first, to the mean of all.
    nearest = (tokens @ mean[..., None])[..., 0]
    is_left, rows = real.clone(), torch.arange(len(vision), device=vision.device)
    scores = torch.zeros(vision.shape, device=vision.device)
    for step in range(vision.shape[1]):
        wanted = -nearest if first is None or step % 2 else first
        chosen = wanted.masked_fill(~is_left, -torch.inf).argmax(dim=1)
        is_one = is_left[rows, chosen]  # a row without tokens that are left chooses none
        scores[rows[is_one], chosen[is_one]] = float(vision.shape[1] - step)
        is_left[rows, chosen] = False
        to_chosen = likeness[rows, chosen]
        nearest = to_chosen if step == 0 else torch.maximum(nearest, to_chosen)
    return scores
