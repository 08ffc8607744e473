"""The tap: text-to-vision attention of chosen layers, computed beside SDPA for the rows asked for.

A layer's attention needs its input, its norm, q and k alone. So the model runs SDPA everywhere, and the tap
recomputes softmax(q k^T) of a layer for the text rows, keeping the vision columns: equal to the eager rows,
with gradient, and never more than one layer's 'B H T S' at a time.
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


@contextmanager
def record_layer_inputs(layers: nn.ModuleList, chosen: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Within the context, a forward leaves the input 'B S D' of every chosen layer in the dict it yields."""
    inputs: dict[int, torch.Tensor] = {}

    def keep(index: int):
        def hook(_module, args, kwargs):
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [layers[index].register_forward_pre_hook(keep(index), with_kwargs=True) for index in chosen]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def attention_of_layers(
    body: Any, inputs: Mapping[int, torch.Tensor], merged: MergedInputs
) -> dict[int, torch.Tensor]:
    """Text-to-vision attention of every layer whose input was recorded, by layer: float32 'B H T J' each.

    `body` is the LLaMA body (`layers`, `rotary_emb`); its sequence begins at position 0.
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
    """Attention of a decoder layer's text rows to the vision columns: float32 'B H T J'.

    Each row is a softmax over ALL keys that it may see (causal, unpadded); only the vision columns are
    returned, so a row sums to the mass that the text position puts on the image. Rows and columns that
    are padding (-1 in `slots`) are zero. `hidden_states` 'B S D' is the layer's input, before its norm;
    `position_embeddings` are rotary cos and sin 'B|1 S D/H'; `attention_mask` bool 'B S'.
    """
    self_attention: Any = layer.self_attn
    query_rows = slots.text.clamp(min=0)
    query, key = _rotated_query_and_key(layer, hidden_states, position_embeddings, query_rows)
    scores = torch.matmul(query, key.transpose(2, 3)) * self_attention.scaling
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    visible = (positions <= query_rows[:, :, None]) & attention_mask[:, None, :]
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32)
    columns = slots.vision.clamp(min=0)[:, None, None].expand(*probabilities.shape[:3], -1)
    real = (slots.text >= 0)[:, None, :, None] & (slots.vision >= 0)[:, None, None, :]
    return probabilities.gather(3, columns) * real


def _rotated_query_and_key(layer, hidden_states, position_embeddings, query_rows):
    """Query of the rows 'B H T h' and key of all positions 'B H S h', rotary applied, key heads repeated."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    rows = query_rows[:, :, None]
    row_states = normed.gather(1, rows.expand(-1, -1, normed.shape[-1]))
    query = attention.q_proj(row_states).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    cos, sin = (table.expand(hidden_states.shape[0], -1, -1) for table in position_embeddings)
    row_cos, row_sin = (table.gather(1, rows.expand(-1, -1, table.shape[-1])) for table in (cos, sin))
    query, _ = apply_rotary_pos_emb(query, query, row_cos, row_sin)
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    return query, key.repeat_interleave(attention.num_key_value_groups, dim=1)
