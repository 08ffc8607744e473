"""Log probabilities of a few tokens from logits over a wide vocabulary, without a second copy of the logits.

Autograd's log-softmax keeps its result for the backward pass, float32 over the whole vocabulary, and so does the sum
over a tail. Here only what was asked for is kept, and the rest is computed again, some rows at a time (the idea of
Liger Kernel's and Cut Cross-Entropy's losses, in plain torch).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = 1 << 25  # of float32 logits that are at work at once
_SMALLEST = 1e-38  # a tail's share of the largest weight: less is nothing in float32
_LARGEST_EXPONENT = 80.0


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at `ids` int64 'A K': float32 'A K' of `logits` 'A V'."""
    picked, total, _ = _Picked.apply(logits, ids, False)
    return picked - total[:, None]


def with_tail(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `log_probabilities`, and the log probability 'A' of all tokens but `ids`, distinct ones and fewer than V."""
    picked, total, tail = _Picked.apply(logits, ids, True)
    return picked - total[:, None], tail - total


class _Picked(torch.autograd.Function):
    """Logits at `ids`, and the log-sum-exp over the vocabulary and over the rest of it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, needs_tail: bool) -> tuple[Tensor, Tensor, Tensor]:
        total = _wide(logits[:0]).new_empty(len(logits))
        tail = torch.zeros_like(total)
        for rows in _pieces(logits):
            piece = _wide(logits[rows])
            largest = piece.amax(dim=-1)
            weights = (piece - largest[:, None]).exp_()
            total[rows] = weights.sum(dim=-1).log() + largest
            if needs_tail:
                rest = weights.scatter_(1, ids[rows], 0).sum(dim=-1)
                tail[rows] = rest.clamp(min=_SMALLEST).log() + largest
        picked = _wide(logits.gather(1, ids))
        ctx.save_for_backward(logits, ids, picked, total, tail)
        ctx.needs_tail = needs_tail
        return picked, total, tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, picked, total, tail = ctx.saved_tensors
        of_picked, of_total, of_tail = gradients
        if ctx.needs_tail:
            # Softmax over the tail is softmax over all, scaled, and none of it at `ids`.
            scale = of_tail * (total - tail).clamp(max=_LARGEST_EXPONENT).exp()
            of_picked = of_picked - scale[:, None] * (picked - total[:, None]).exp()
            of_total = of_total + scale
        result = torch.empty_like(logits)
        for rows in _pieces(logits):
            probabilities = (_wide(logits[rows]) - total[rows, None]).exp_()
            gradient = probabilities.mul_(of_total[rows, None])
            result[rows] = gradient.scatter_add_(1, ids[rows], of_picked[rows]).to(result.dtype)
        return result, None, None


def _wide(logits: Tensor) -> Tensor:
    """At least float32: half precision has no room for a sum over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _pieces(logits: Tensor) -> Iterator[slice]:
    size = max(1, PIECE_BYTES // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
