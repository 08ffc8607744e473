"""The parts of a base model that a twig, pruning and speculation call: layers, final norm, head, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.anatomy import anatomy_of
from pipeline.models.tap import TAPPED, final_norm


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
            final_norm(decoder),
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
