"""Log probabilities of a few tokens from logits over a wide vocabulary, without a second copy of the logits.

Autograd's log-softmax keeps a float32 result over the whole vocabulary for the backward pass, and so does the sum
over a tail. Here only the requested values are kept. The backward pass recomputes the rest, some rows at a time (the
idea of Liger Kernel's and Cut Cross-Entropy's losses, in plain torch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE_BYTES = 1 << 25  # float32 logits in work at once
SMALLEST_LOG_PROBABILITY = -30.0  # differences below it are noise
_SMALLEST = 1e-38  # smallest normal float32: a tail without mass has a finite log
_LARGEST_EXPONENT = 80.0  # exp(80) is still finite in float32


@dataclass(frozen=True)
class AnswerScores:
    """Log probabilities at every answer position, float32; empty where nothing was asked for.

    `label` 'A' of the label, `top` 'A K' of the teacher's top K, `tail` 'A' of all tokens but these, `draws` 'A Z' of
    the tokens drawn from there.
    """

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
    """Return what the losses read of `logits` 'A V', with one pass over the vocabulary in each direction."""
    none = labels.new_empty(len(labels), 0)
    groups = [labels[:, None], *(none if ids is None else ids for ids in (draw_ids, top_ids))]
    num_labels, num_draws, num_top = (ids.shape[1] for ids in groups)
    needs_tail = 0 < num_top < logits.shape[1]
    picked, total, tail = _Picked.apply(
        logits, torch.cat(groups, dim=1), num_top if needs_tail else 0, piece_bytes
    )
    label, draws, top = (picked - total[:, None]).split((num_labels, num_draws, num_top), dim=1)
    # Contiguous, so that a sum over labels has the same bits whatever else was asked for.
    label = label.squeeze(1).contiguous()
    return AnswerScores(label, top, tail - total if needs_tail else tail[:0], draws)


def with_tail(logits: Tensor, ids: Tensor, *, piece_bytes: int = PIECE_BYTES) -> tuple[Tensor, Tensor]:
    """Return the log softmax of `logits` 'A V' at `ids` int64 'A K', and that of all other tokens together 'A'.

    The ids of a row must be distinct, and fewer than V.
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
            # d tail / d logits is softmax over the tail: softmax over all, scaled by exp(total - tail), and zero at
            # the last `num_top` of `ids`. So the scaled softmax joins `of_total`, and is taken off at those ids.
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
    """Return logits in at least float32: half precision cannot hold a sum over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _pieces(logits: Tensor, piece_bytes: int) -> Iterator[slice]:
    size = max(1, piece_bytes // (4 * logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
