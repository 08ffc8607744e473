"""Random draws of tokens outside a teacher's top K, the same for a sample on every machine and in every batch."""

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
    """Return token ids int64 'A Z', ascending, drawn with replacement from softmax(logits) without its top K.

    `log_probs` 'A V' and `top_ids` 'A K', K < V, hold the answer positions of all samples in order, `num_answers` of
    each. A sample's draws depend only on its key and its own rows. Rounding can move a draw to the next id, with a
    probability of the order of the rounding error.
    """
    drawn = [
        _draw(rows, ids, torch.from_numpy(uniforms(key, len(rows), num_draws)).to(rows.device))
        for key, rows, ids in zip(
            keys, log_probs.split(list(num_answers)), top_ids.split(list(num_answers)), strict=True
        )
    ]
    return torch.cat(drawn) if drawn else top_ids.new_zeros(0, num_draws)


def uniforms(key: str, num_rows: int, num_draws: int) -> np.ndarray:
    """Return float64 '(num_rows, num_draws)' in (0, 1), 32 bits of the key's blake3 stream each.

    A hash, not a generator: torch's and numpy's streams may change with their versions.
    """
    stream = blake3(key.encode(), derive_key_context=PURPOSE).digest(length=4 * num_rows * num_draws)
    return (np.frombuffer(stream, dtype="<u4").reshape(num_rows, num_draws) + 0.5) / 2.0**32


def _draw(log_probs: Tensor, top_ids: Tensor, uniform: Tensor) -> Tensor:
    """Draw by the inverse of the cumulative distribution.

    float64, because float32 sums over a vocabulary lose small tokens; one sample at a time, because that is wide.
    """
    tail = log_probs.double().scatter(1, top_ids, float("-inf")).softmax(dim=-1)
    cumulative = tail.cumsum(dim=-1)
    # `right=True` never draws a token without mass: its sum equals its predecessor's, so it is not the first above.
    # Scaled by the last sum, which rounding leaves a little off 1.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Sums that are NaN draw an id past the last one. Any id has NaN then, and the store refuses the sample.
    return drawn.clamp(max=cumulative.shape[1] - 1).sort(dim=-1).values
