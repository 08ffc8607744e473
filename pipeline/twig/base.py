"""The parts of a base model that a twig, pruning and speculation call: layers, final norm, head, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.anatomy import Anatomy, anatomy_of
from pipeline.models.tap import TAPPED


@dataclass(frozen=True)
class Base:
    """A model of the door, by its parts. It adds no parameters."""

    network: Any
    layers: Sequence[nn.Module]
    norm: nn.Module
    head: nn.Module
    embeddings: nn.Module

    @classmethod
    def of(cls, network: Any) -> Base:
        """Return the parts of a network, which may be without weights.

        Raises `ConfigError` for a family with layers that have no attention: what they remember of earlier positions
        cannot be cut back to the confirmed ones.
        """
        decoder, anatomy = network.get_decoder(), anatomy_of(network.config)
        decoder.set_attn_implementation({"": TAPPED})  # SDPA, whose masks can be cut to some rows
        if list(anatomy.layer_of) != list(range(len(decoder.layers))):
            raise ConfigError(
                f"twig: of the {len(decoder.layers)} layers of the family {network.config.model_type!r} only "
                f"{len(anatomy.layer_of)} have attention; a twig needs a base whose layers all have it"
            )
        return cls(
            network,
            list(decoder.layers),
            _final_norm(decoder, anatomy, network),
            network.get_output_embeddings(),
            network.get_input_embeddings(),
        )

    @property
    def vocab_size(self) -> int:
        """V, the rows of the head."""
        return next(self.head.parameters()).shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits '... V' of the last layer's output '... D'."""
        return self.head(self.norm(hidden))


def _final_norm(decoder: Any, anatomy: Anatomy, network: Any) -> nn.Module:
    """Return the one module of a decoder that all text passes between its layers and the head."""
    groups = anatomy.groups()
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    found = [
        child
        for child in decoder.children()
        if child is not decoder.layers
        and (names := [name_of[id(p)] for p in child.parameters()])
        and all(groups.get(name) == "head" for name in names)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"twig: {type(decoder).__name__} has {len(found)} modules before its head, one was expected"
        )
    return found[0]
