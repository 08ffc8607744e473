"""The tap: text-to-vision attention of chosen decoder layers, with gradient.

The model runs SDPA, which returns no attention. The tap recomputes softmax(q k^T) of a layer from the layer's
input, norm, q and k: the text rows alone, of which it keeps the vision columns. The values equal those of eager
attention, and only one layer's 'B H T S' is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.models.merge import MergedInputs
from pipeline.positions import Slots


class _LayerReached(Exception):  # noqa: N818 - it ends a forward, and is no error
    """The forward reached the layer that it was to stop at."""


@contextmanager
def record_layer_inputs(
    layers: nn.ModuleList, chosen: Iterable[int], *, stop_at: int | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """Yield a dict that a forward in the context fills with the input 'B S D' of each chosen layer.

    With `stop_at` the forward ends there: neither that layer nor anything after it runs, so that their weights need
    not be loaded. The statement in the context is then left without a result.
    """
    inputs: dict[int, torch.Tensor] = {}

    def keep(index: int):
        def hook(_module, args, kwargs):
            inputs[index] = args[0] if args else kwargs["hidden_states"]
            if index == stop_at:
                raise _LayerReached

        return hook

    handles = [layers[index].register_forward_pre_hook(keep(index), with_kwargs=True) for index in chosen]
    try:
        yield inputs
    except _LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def attention_of_layers(
    body: Any, inputs: Mapping[int, torch.Tensor], merged: MergedInputs
) -> dict[int, torch.Tensor]:
    """Return the text-to-vision attention of every layer whose input was recorded: layer -> float32 'B H T J'.

    `body` is the LLaMA body (`layers`, `rotary_emb`). Its sequence begins at position 0.
    """
    length, device = merged.attention_mask.shape[1], merged.attention_mask.device
    position_embeddings = body.rotary_emb(merged.inputs_embeds, torch.arange(length, device=device)[None])
    return {
        layer: text_to_vision_attention(
            body.layers[layer],
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=merged.attention_mask,
            slots=merged.slots,
        )
        for layer, hidden_states in inputs.items()
    }


def text_to_vision_attention(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    slots: Slots,
) -> torch.Tensor:
    """Return the attention of a decoder layer's text rows to the vision columns: float32 'B H T J'.

    Each row is a softmax over all keys that it may see (causal, unpadded). Only the vision columns are returned, so a
    row sums to the share of attention that falls on the image. Padding rows and columns (-1 in `slots`) are zero.
    `hidden_states` 'B S D' is the layer's input, before its norm; `position_embeddings` are rotary cos and sin
    'B|1 S D/H'; `attention_mask` is bool 'B S'.
    """
    self_attention: Any = layer.self_attn
    query_rows = slots.text.clamp(min=0)  # a padding row reads position 0, and is zeroed at the end
    query, key = _rotated_query_and_key(layer, hidden_states, position_embeddings, query_rows)
    scores = torch.matmul(query, key.transpose(2, 3)) * self_attention.scaling
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    visible = (positions <= query_rows[:, :, None]) & attention_mask[:, None, :]
    # Not -inf: where a padding row sees nothing, softmax would give NaN, and NaN times zero is NaN.
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    # float32 as in eager attention: half precision is too coarse for the small shares of a long row.
    probabilities = scores.softmax(dim=-1, dtype=torch.float32)
    columns = slots.vision.clamp(min=0)[:, None, None].expand(*probabilities.shape[:3], -1)
    real = (slots.text >= 0)[:, None, :, None] & (slots.vision >= 0)[:, None, None, :]
    return probabilities.gather(3, columns) * real


def _rotated_query_and_key(layer, hidden_states, position_embeddings, query_rows):
    """Return the rows' query 'B H T D/H' and all positions' key 'B H S D/H', rotary applied, key heads repeated."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    rows = query_rows[:, :, None]
    # Only text rows are projected to queries: each row costs S scores, and most rows are vision rows.
    row_states = normed.gather(1, rows.expand(-1, -1, normed.shape[-1]))
    query = attention.q_proj(row_states).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    cos, sin = (table.expand(hidden_states.shape[0], -1, -1) for table in position_embeddings)
    row_cos, row_sin = (table.gather(1, rows.expand(-1, -1, table.shape[-1])) for table in (cos, sin))
    # Query and key are rotated apart, because they have different positions.
    query, _ = apply_rotary_pos_emb(query, query, row_cos, row_sin)
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    return query, key.repeat_interleave(attention.num_key_value_groups, dim=1)
