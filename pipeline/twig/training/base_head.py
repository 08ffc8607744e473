"""The base's own head, frozen: the base's logits of its stored last hidden states, without the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.models.anatomy import empty_network
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.twig.folder import read_as


@dataclass(frozen=True)
class BaseHead:
    """The head of a base: hidden states after the final norm 'A D' -> logits 'A V'.

    This is no module, so that a module which holds it does not train or save it.
    """

    module: nn.Module

    @classmethod
    def load(cls, name: str, config: Any, *, dtype: torch.dtype, device: torch.device | str) -> BaseHead:
        """Read the head, and no other weight, of the checkpoint `name`."""
        network = empty_network(config, dtype=dtype)
        head = network.get_output_embeddings()
        tensors = read_as(names_of_head(network), Checkpoint(name), network, dtype=dtype)
        tensors = {own: tensor.to(device) for own, tensor in tensors.items()}
        head.load_state_dict(tensors, assign=True)
        return cls(head.requires_grad_(False))


def names_of_head(network: Any) -> dict[str, str]:
    """Return the name of each parameter of the head -> its name in the network, where embeddings may share it."""
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    return {name: name_of[id(one)] for name, one in network.get_output_embeddings().named_parameters()}
