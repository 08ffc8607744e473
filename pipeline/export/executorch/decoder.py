"""The language model with a cache of keys and values as one program: embeddings -> logits of the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.configuration_utils import get_head_shapes

from pipeline.export.executorch.lowering import Method, write_program

MOST_POSITIONS = 2048  # of the cache
CHUNK = 512  # positions that are read at once: the program reserves memory for that many
# Families whose decoder is causal and reads a picture as embeddings alone. Others see pictures both ways (Gemma 3,
# PaliGemma), number positions by the picture's grid (Qwen) or read features of several layers.
CAUSAL = ("mobilevlm", "llava", "internvl")


def why_not(config: Any) -> str | None:
    """Return why a family's decoder is not exported; None if it is."""
    if config.model_type in CAUSAL:
        return None
    return (
        f"the decoder of {config.model_type!r} is not exported (those of {', '.join(CAUSAL)} are: causal, with "
        "pictures as embeddings alone); use another runtime for it"
    )


class DecoderModule(nn.Module):
    """A causal language model, whose cache the program holds from call to call."""

    def __init__(self, network: Any, *, context: int) -> None:
        super().__init__()
        self.network = network
        text = network.config.get_text_config()
        self.cache = StaticCache(max_cache_len=context, config=text)
        self.cache.early_initialization(1, *get_head_shapes(text), torch.float32, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
        self.layers: list[Any] = list(self.cache.layers)
        for number, layer in enumerate(self.layers):
            self.register_buffer(f"keys_{number}", layer.keys, persistent=False)
            self.register_buffer(f"values_{number}", layer.values, persistent=False)

    def forward(self, embeddings: Tensor, position: Tensor) -> Tensor:
        """Return logits 'V' behind embeddings 'S D', the first of which stands at `position` '1'."""
        for number, layer in enumerate(self.layers):
            # While a module is traced, its buffers are other tensors, and those are what the program keeps.
            layer.keys = getattr(self, f"keys_{number}")
            layer.values = getattr(self, f"values_{number}")
            layer.cumulative_length = position[0].clone()
        output = self.network(
            inputs_embeds=embeddings[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]


class EmbeddingModule(nn.Module):
    """The embeddings of token ids."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.table = network.get_input_embeddings()

    def forward(self, ids: Tensor) -> Tensor:
        """Return 'S D' of ids 'S'."""
        return self.table(ids)


def context_of(config: Any) -> int:
    """Return how many positions the cache holds."""
    return min(config.get_text_config().max_position_embeddings, MOST_POSITIONS)


def write_decoder(network: Any, file: Path) -> None:
    """Write the program: `forward` reads up to `CHUNK` embeddings at a position, `embed` makes them of ids."""
    context = context_of(network.config)
    length = torch.export.Dim("S", min=1, max=min(CHUNK, context))
    example = torch.zeros(3, network.config.get_text_config().hidden_size), torch.tensor([0])
    methods = {
        "forward": Method(DecoderModule(network, context=context), example, ({0: length}, None)),
        "embed": Method(EmbeddingModule(network), (torch.tensor([1, 2, 3]),), ({0: length},)),
    }
    what = f"the decoder of {network.config.model_type!r}"
    write_program(methods, file, what=what, otherwise="export the vision tower alone (--no-decoder)")
