"""The twig: T decoder layers on the output of the base's layer K, with a norm and a head of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.anatomy import anatomy_of, empty_network
from pipeline.models.tap import TAPPED, query_to_vision, recording
from pipeline.twig.base import Base
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.pruning_head import PruningHead, keeping_input

# The last prompt positions 'B' and the vision tokens 'B J' (-1: none) -> scores of these, float32 'B J'.
Scores = Callable[[Tensor, Tensor], Tensor]


class Twig(nn.Module):
    """A twig of a base (TwigVLM, arXiv 2503.14075): layers of its family, a final norm and an untied head.

    Base and twig have the same arguments for their layers: those of base layers K..K+T-1. `pruning_head` makes the
    scores of vision tokens; without one they are the attention of its last layer. `draft_ids` int64 'V' are the only
    tokens that it drafts, None: all.
    """

    draft_ids: Tensor | None
    short_weight: Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        layers: Iterable[nn.Module],
        norm: nn.Module,
        head: nn.Module,
        pruning_head: PruningHead | None = None,
    ):
        super().__init__()
        self.geometry = geometry
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        self.pruning_head = pruning_head
        self.gradient_checkpointing = False
        self.register_buffer("draft_ids", None)
        self.register_buffer("short_weight", None, persistent=False)

    @classmethod
    def empty(
        cls, config: Any, geometry: Geometry, *, dtype: torch.dtype | None = None, prunes: bool = False
    ) -> Twig:
        """Return a twig of a base of this config, without weights: its parameters are on the meta device.

        `prunes` gives it a pruning head.
        """
        network = empty_network(config, attention=TAPPED, dtype=dtype)
        base = Base.of(network)
        first = geometry.attach_layer
        made = cls(geometry, base.layers[first : first + geometry.num_layers], base.norm, base.head)
        if prunes:
            made.add_pruning_head(config)
        return made

    @classmethod
    def copied(cls, network: Any, geometry: Geometry, *, prunes: bool = False) -> Twig:
        """Return a twig whose layers, norm and head are copies of a model's in memory; they can be trained.

        `prunes` gives it a pruning head of random weights.
        """
        base = Base.of(network)
        first = geometry.attach_layer
        made = cls(
            geometry,
            (copy.deepcopy(layer) for layer in base.layers[first : first + geometry.num_layers]),
            copy.deepcopy(base.norm),
            copy.deepcopy(base.head),
        )
        if prunes:
            made.add_pruning_head(network.config)
        # Copies of a frozen layer are frozen.
        return made.requires_grad_(True)

    def add_pruning_head(self, config: Any) -> None:
        """Give it a pruning head with first weights as those of `nn.Linear`, for a base of this config."""
        like = next(self.head.parameters())
        with like.device:
            made = PruningHead(self.layers[-1].self_attn, config.get_text_config())
        self.pruning_head = made.to(like.dtype)

    def names_in_base(self, config: Any) -> dict[str, str]:
        """Return the name of each of its tensors -> the name of the base's tensor that it begins as a copy of.

        Tensors of the pruning head are no copies.
        """
        network = empty_network(config)
        base, first = Base.of(network), self.geometry.attach_layer
        name_of = {id(parameter): name for name, parameter in network.named_parameters()}
        names = {}
        for name, _ in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "pruning_head":
                continue
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

    @contextmanager
    def scoring(self) -> Iterator[Scores]:
        """Yield the scores of vision tokens, to be called after its layers have run over the prompts in this context.

        They are those of the pruning head, which sum to 1, or the attention of the last layer over the whole row,
        mean over heads (TwigVLM's pruning).
        """
        last = len(self.layers) - 1
        attention = cast(nn.Module, self.layers[last].self_attn)
        with recording({last}) as made, keeping_input(attention) as inputs:

            def scores(rows: Tensor, vision: Tensor) -> Tensor:
                if self.pruning_head is not None:
                    return self.pruning_head(made.kept[last], inputs[-1], rows, vision)
                return query_to_vision(made.kept[last], rows, vision, whole_row=True).mean(dim=1)

            yield scores

    def forward(
        self, hidden: Tensor, inputs: LayerInputs, answers: Tensor, rows: Tensor, vision: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits 'A V' at the positions `answers`, bool 'B S', from the output of base layer K, 'B S D'.

        With a pruning head also its scores 'B J', from the last prompt positions `rows` 'B'.
        """
        if self.pruning_head is None:
            return self.logits(self.run_layers(hidden, inputs)[answers]), None
        with self.scoring() as scores:
            hidden = self.run_layers(hidden, inputs)
        return self.logits(hidden[answers]), scores(rows, vision)
