"""The twig: T decoder layers on the output of the base's layer K, with a norm and a head of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.anatomy import anatomy_of, empty_network
from pipeline.models.tap import TAPPED
from pipeline.twig.base import Base
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs


class Twig(nn.Module):
    """A twig of a base (TwigVLM, arXiv 2503.14075): layers of its family, a final norm and an untied head.

    Base and twig have the same arguments for their layers: those of base layers K..K+T-1. `draft_ids` int64 'V' are
    the only tokens that it drafts, None: all.
    """

    draft_ids: Tensor | None
    short_weight: Tensor | None

    def __init__(self, geometry: Geometry, layers: Iterable[nn.Module], norm: nn.Module, head: nn.Module):
        super().__init__()
        self.geometry = geometry
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        self.gradient_checkpointing = False
        self.register_buffer("draft_ids", None)
        self.register_buffer("short_weight", None, persistent=False)

    @classmethod
    def empty(cls, config: Any, geometry: Geometry, *, dtype: torch.dtype | None = None) -> Twig:
        """Return a twig of a base of this config, without weights: its parameters are on the meta device."""
        network = empty_network(config, attention=TAPPED, dtype=dtype)
        base = Base.of(network)
        first = geometry.attach_layer
        return cls(geometry, base.layers[first : first + geometry.num_layers], base.norm, base.head)

    @classmethod
    def copied(cls, network: Any, geometry: Geometry) -> Twig:
        """Return a twig whose layers, norm and head are copies of a model's in memory; they can be trained."""
        base = Base.of(network)
        first = geometry.attach_layer
        made = cls(
            geometry,
            (copy.deepcopy(layer) for layer in base.layers[first : first + geometry.num_layers]),
            copy.deepcopy(base.norm),
            copy.deepcopy(base.head),
        )
        # Copies of a frozen layer are frozen.
        return made.requires_grad_(True)

    def names_in_base(self, config: Any) -> dict[str, str]:
        """Return the name of each of its tensors -> the name of the base's tensor that it begins as a copy of."""
        network = empty_network(config)
        base, first = Base.of(network), self.geometry.attach_layer
        name_of = {id(parameter): name for name, parameter in network.named_parameters()}
        names = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "layers":
                number, _, rest = rest.partition(".")
                names[name] = f"{anatomy_of(config).layers}{first + int(number)}.{rest}"
            else:
                module = base.norm if part == "norm" else base.head
                names[name] = name_of[id(module.get_parameter(rest))]
        return names

    def run_layers(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Return the output of its last layer for the whole sequence, before the norm: 'B S D' -> 'B S D'."""
        first = self.geometry.attach_layer
        for layer, kind in zip(self.layers, inputs.kinds[first:], strict=False):
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **kind.whole())
            else:
                hidden = layer(hidden, **kind.whole())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits '... V' of its last layer's output '... D'."""
        return self.head(self.norm(hidden))

    def shorten(self, ids: Tensor) -> None:
        """Draft these tokens alone, by their rows of the head, which is up to half of a small model's draft."""
        assert isinstance(self.head, nn.Linear) and self.head.bias is None
        self.draft_ids, self.short_weight = ids, self.head.weight.detach()[ids]

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Return logits 'B V' of its last layer's output 'B D', or those of `draft_ids` alone, in their order."""
        if self.short_weight is None:
            return self.logits(hidden)
        return nn.functional.linear(self.norm(hidden), self.short_weight)

    def forward(self, hidden: Tensor, inputs: LayerInputs, answers: Tensor) -> Tensor:
        """Return logits 'A V' at the positions `answers`, bool 'B S', from the output of base layer K, 'B S D'."""
        return self.logits(self.run_layers(hidden, inputs)[answers])
