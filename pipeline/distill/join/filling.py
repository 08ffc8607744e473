"""Fields of `TeacherTargets` as a forward of the teacher gives them, and put in the place of zeros in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipeline.positions import Counts
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.query_attention import QueryAttentionTarget
from pipeline.targets.target import Target, TeacherForward

# Fields with the rows of all samples one after another, by how many each sample has; all others have an axis 'B'.
FLAT: dict[str, Callable[[Counts], Tensor]] = {
    "vision": lambda counts: counts.vision_tokens,
    "final_hidden": lambda counts: counts.answers,
}


def of_forward(target: Target, forward: TeacherForward) -> Any:
    """Return a target's field of `TeacherTargets`, of any target but vision, which is known before the forward.

    It equals what `collate` returns of `capture`, but for what the codec loses.
    """
    if isinstance(target, AttentionTarget):
        return {layer: target.reduce_heads(block).float() for layer, block in forward.attention.items()}
    if isinstance(target, QueryAttentionTarget):
        assert forward.query_attention is not None
        return target.reduce_heads(forward.query_attention).float()
    if target.hidden_layer is not None:
        assert forward.hidden is not None and forward.is_real is not None
        return forward.hidden.float().masked_fill(~forward.is_real[:, :, None], 0)
    assert forward.answer_hidden is not None
    return forward.answer_hidden.float()


def filled(name: str, stored: Any, made: Any, lacks: Tensor, *, chosen: Tensor, counts: Counts) -> Any:
    """Return a field of a batch with what was made of the samples in `lacks`, bool 'B', in their places.

    `made` is of the samples in `chosen`, bool 'B', which has all of `lacks`; its T, J and S may be smaller.
    """
    if isinstance(stored, Mapping):
        return {layer: _put(block, lacks, made[layer][lacks[chosen]]) for layer, block in stored.items()}
    if name not in FLAT:
        return _put(stored, lacks, made[lacks[chosen]])
    num_rows = FLAT[name](counts)
    of_batch = lacks.repeat_interleave(num_rows)
    of_made = lacks[chosen].repeat_interleave(num_rows[chosen])
    return stored.index_put((of_batch,), made[of_made])


def _put(stored: Tensor, samples: Tensor, made: Tensor) -> Tensor:
    """Return `stored` with the blocks of `made`, which may be smaller, in the samples of bool 'B'."""
    result = stored.clone()
    result[(samples, *(slice(size) for size in made.shape[1:]))] = made
    return result
