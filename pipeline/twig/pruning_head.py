"""The pruning head of a twig: gates on query and key of its last layer, whose scores say which vision tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.tap import QueryAndKey, query_to_vision


class PruningHead(nn.Module):
    """Gates on the attention of a twig's last layer (TwigVLM++'s P-Head).

    Scores are the mean over heads of softmax((gate(G_q x_q) q) . (gate(G_k X_k) k) / sqrt(D/H)) over the vision
    tokens alone, with gate(x) = ReLU(x) sigmoid(x). x are the inputs of the attention, after its norm; q and k come
    after rotation. Heads that share a key share its gate.
    """

    def __init__(self, attention: Any, text_config: Any):
        super().__init__()
        num_heads, width = text_config.num_attention_heads, text_config.hidden_size
        num_groups = getattr(text_config, "num_key_value_heads", None) or num_heads
        self.query = nn.Linear(width, num_heads * attention.head_dim, bias=False)
        self.key = nn.Linear(width, num_groups * attention.head_dim, bias=False)

    def draw(self) -> None:
        """Give it first weights: those of `nn.Linear`, as in the released code."""
        self.query.reset_parameters()
        self.key.reset_parameters()

    def forward(self, kept: QueryAndKey, inputs: Tensor, rows: Tensor, vision: Tensor) -> Tensor:
        """Return scores float32 'B J' of the vision tokens at `vision` 'B J' (-1: none), which sum to 1.

        `inputs` 'B S D' are the attention's, and `rows` 'B' the last prompt positions.
        """
        asking = inputs.gather(1, rows.clamp(min=0)[:, None, None].expand(-1, 1, inputs.shape[2]))
        asked = inputs.gather(1, vision.clamp(min=0)[..., None].expand(-1, -1, inputs.shape[2]))
        narrow = kept.narrowed(rows, vision)
        gated = replace(
            narrow,
            query=narrow.query * _gate(self.query(asking), narrow.query),
            key=narrow.key * _gate(self.key(asked), narrow.key),
        )
        columns = torch.arange(vision.shape[1], device=vision.device).where(vision >= 0, -1)
        return query_to_vision(gated, rows.clamp(max=0), columns, whole_row=False).mean(dim=1)


def _gate(values: Tensor, like: Tensor) -> Tensor:
    """Return ReLU(x) sigmoid(x) of 'B S H*D/H', in the shape of 'B H S D/H'."""
    by_head = values.unflatten(2, (like.shape[1], -1)).transpose(1, 2)
    return by_head.relu() * by_head.sigmoid()


@contextmanager
def keeping_input(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which a run of an attention module appends its input 'B S D'."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(args[0] if args else named["hidden_states"])

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()
