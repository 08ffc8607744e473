"""Log probabilities of a few tokens from logits over a wide vocabulary, without a second copy of the logits.

Autograd's log-softmax keeps its result for the backward pass, float32 over the whole vocabulary, and so does the sum
over a tail. Here only what was asked for is kept, and the rest is computed again, some rows at a time (the idea of
Liger Kernel's and Cut Cross-Entropy's losses, in plain torch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = 1 << 25  # of float32 logits that are at work at once
SMALLEST_LOG_PROBABILITY = -30.0  # below it log probabilities are alike: differences there are noise
_SMALLEST = 1e-38  # a tail's share of the largest weight: less is nothing in float32
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class AnswerScores:
    """Log probabilities, float32, of a few tokens at every answer position: of the label 'A', of the teacher's top K
    'A K', of all tokens but these 'A', and of the draws from there 'A Z'; empty where nothing was asked for."""

    label: Tensor
    top: Tensor
    tail: Tensor
    draws: Tensor


def score_answers(
    logits: Tensor,
    labels: Tensor,
    top_ids: Tensor | None = None,
    draw_ids: Tensor | None = None,
    *,
    piece_bytes: int = PIECE_BYTES,
) -> AnswerScores:
    """All that losses read of `logits` 'A V', by one pass over the vocabulary, and one backward."""
    none = labels.new_empty(len(labels), 0)
    groups = [labels[:, None], *(none if ids is None else ids for ids in (draw_ids, top_ids))]
    num_labels, num_draws, num_top = (ids.shape[1] for ids in groups)
    needs_tail = 0 < num_top < logits.shape[1]
    picked, total, tail = _Picked.apply(
        logits, torch.cat(groups, dim=1), num_top if needs_tail else 0, piece_bytes
    )
    label, draws, top = (picked - total[:, None]).split((num_labels, num_draws, num_top), dim=1)
    # In one piece, so that sums over labels are the same bits whatever else was asked for.
    label = label.squeeze(1).contiguous()
    return AnswerScores(label, top, tail - total if needs_tail else tail[:0], draws)


def with_tail(logits: Tensor, ids: Tensor, *, piece_bytes: int = PIECE_BYTES) -> tuple[Tensor, Tensor]:
    """Log softmax of `logits` 'A V' at `ids` int64 'A K', and that of all other tokens 'A'.

    The ids of a row are distinct, and fewer than V.
    """
    picked, total, tail = _Picked.apply(logits, ids, ids.shape[1], piece_bytes)
    return picked - total[:, None], tail - total


class _Picked(torch.autograd.Function):
    """Logits at `ids`, and the log-sum-exp over the vocabulary and over all of it but the last `num_top` of `ids`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, num_top: int, piece_bytes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = _wide(logits[:0]).new_empty(len(logits))
        tail = torch.zeros_like(total)
        for rows in _pieces(logits, piece_bytes):
            piece = _wide(logits[rows])
            largest = piece.amax(dim=-1)
            weights = (piece - largest[:, None]).exp_()
            total[rows] = weights.sum(dim=-1).log() + largest
            if num_top:
                rest = weights.scatter_(1, ids[rows, -num_top:], 0).sum(dim=-1)
                tail[rows] = rest.clamp(min=_SMALLEST).log() + largest
        picked = _wide(logits.gather(1, ids))
        ctx.save_for_backward(logits, ids, picked, total, tail)
        ctx.num_top, ctx.piece_bytes = num_top, piece_bytes
        return picked, total, tail

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, picked, total, tail = ctx.saved_tensors
        of_picked, of_total, of_tail = gradients
        if num_top := ctx.num_top:
            # Softmax over the tail is softmax over all, scaled, and none of it at the last of `ids`.
            scale = of_tail * (total - tail).clamp(max=_LARGEST_EXPONENT).exp()
            of_picked = of_picked.clone()
            of_picked[:, -num_top:] -= scale[:, None] * (picked[:, -num_top:] - total[:, None]).exp()
            of_total = of_total + scale
        result = torch.empty_like(logits)
        for rows in _pieces(logits, ctx.piece_bytes):
            probabilities = (_wide(logits[rows]) - total[rows, None]).exp_()
            gradient = probabilities.mul_(of_total[rows, None])
            result[rows] = gradient.scatter_add_(1, ids[rows], of_picked[rows]).to(result.dtype)
        return result, None, None, None


def _wide(logits: Tensor) -> Tensor:
    """At least float32: half precision has no room for a sum over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _pieces(logits: Tensor, piece_bytes: int) -> Iterator[slice]:
    size = max(1, piece_bytes // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
