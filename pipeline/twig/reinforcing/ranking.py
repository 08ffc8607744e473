"""Choices of vision tokens without replacement: drawn one after another from shares (Plackett-Luce)."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a token that cannot be drawn. Finite, because the gradient of a log of a sum of zeros is NaN.
LOWEST = -1e4
SMALLEST_SHARE = 1e-9


def log_shares(shares: Tensor, can_be_drawn: Tensor) -> Tensor:
    """Return the logs 'B J' of shares 'B J'; `LOWEST` where a token cannot be drawn, bool 'B J'."""
    return shares.clamp(min=SMALLEST_SHARE).log().masked_fill(~can_be_drawn, LOWEST)


@torch.no_grad()
def draw_rankings(logs: Tensor, num_draws: int) -> Tensor:
    """Return `num_draws` orders of the tokens, int64 'B G J': the first R of one are R tokens without replacement.

    Tokens that cannot be drawn come last. To sort logs with independent Gumbel noise is to draw one after another.
    """
    noise = torch.empty(len(logs), num_draws, logs.shape[1], device=logs.device).exponential_().log().neg()
    noisy = logs[:, None] + noise
    return noisy.masked_fill((logs == LOWEST)[:, None], -torch.inf).argsort(dim=2, descending=True)


def log_probability(logs: Tensor, rankings: Tensor, counts: Tensor) -> Tensor:
    """Return the log probability 'B G' of drawing the first `counts` 'B' tokens of rankings 'B G J' in this order.

    The sum over j of log s(a_j) - log(sum of the shares that are left), TwigVLM++'s Eq. 13.
    """
    in_order = logs[:, None].expand_as(rankings).gather(2, rankings)
    left = in_order.flip(2).logcumsumexp(dim=2).flip(2)
    is_drawn = torch.arange(rankings.shape[2], device=logs.device) < counts[:, None, None]
    return ((in_order - left) * is_drawn).sum(dim=2)
