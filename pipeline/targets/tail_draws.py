"""Draws from what a teacher's top K leaves out, the same for a sample wherever and whenever it is captured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

PURPOSE = "alignkd: draws from the tail of a teacher's answer"


def draw_tail(
    log_probs: Tensor, top_ids: Tensor, *, keys: Sequence[str], num_answers: Sequence[int], num_draws: int
) -> Tensor:
    """Token ids int64 'A Z', ascending, drawn with replacement from softmax(logits) without its top K.

    `log_probs` 'A V' and `top_ids` 'A K', K < V, hold the answer positions of all samples in order, `num_answers` of
    each; `keys` name the samples. A sample's draws depend on its key and its own rows alone. Rounding may move one to
    the next id, as it moves last bits: with a probability of the order of the rounding.
    """
    drawn = [
        _draw(rows, ids, torch.from_numpy(uniforms(key, len(rows), num_draws)).to(rows.device))
        for key, rows, ids in zip(
            keys, log_probs.split(list(num_answers)), top_ids.split(list(num_answers)), strict=True
        )
    ]
    return torch.cat(drawn) if drawn else top_ids.new_zeros(0, num_draws)


def uniforms(key: str, num_rows: int, num_draws: int) -> np.ndarray:
    """float64 '(num_rows, num_draws)' in (0, 1): the blake3 stream of the key, 32 bits each, on every platform."""
    stream = blake3(key.encode(), derive_key_context=PURPOSE).digest(length=4 * num_rows * num_draws)
    return (np.frombuffer(stream, dtype="<u4").reshape(num_rows, num_draws) + 0.5) / 2.0**32


def _draw(log_probs: Tensor, top_ids: Tensor, uniform: Tensor) -> Tensor:
    """By the inverse of the cumulative distribution, in float64: of one sample at a time, because it is wide."""
    tail = log_probs.double().scatter(1, top_ids, float("-inf")).softmax(dim=-1)
    cumulative = tail.cumsum(dim=-1)
    # `right`: a token of no mass has its predecessor's sum, and the first sum above the uniform is never its own.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.sort(dim=-1).values
