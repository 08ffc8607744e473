"""Neighbouring layers with the keys and values that they share the positions of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.twig.layer_inputs import LayerInputs


class LayerGroup:
    """Layers `first`, `first` + 1, ... that see the same positions, and their cache.

    `columns` 'B C' are the positions of the sequence that the cache holds, in order; -1 where it holds nothing for a
    sample: padding, or a rejected draft. Room for `capacity` positions is allocated at first, and more when needed.
    """

    def __init__(
        self, layers: Iterable[nn.Module], first: int, inputs: LayerInputs, *, capacity: int, is_plain: bool
    ):
        self.layers, self.first, self.capacity, self.is_plain = list(layers), first, capacity, is_plain
        self.kinds = inputs.kinds[first : first + len(self.layers)]
        self.added = inputs.added
        self.columns = torch.empty(len(inputs.embeds), 0, dtype=torch.long, device=inputs.embeds.device)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values 'B G capacity D/H'
        self.num_rows = 0  # computed so far, times the layers

    @property
    def device(self) -> torch.device:
        return self.columns.device

    @property
    def length(self) -> int:
        """How many positions the cache holds."""
        return self.columns.shape[1]

    def run(self, hidden: Tensor, rows: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the output of the last layer for new positions `rows` 'B Q' (-1: none): 'B Q D' -> 'B Q D'.

        `visible`: see `LayerKind.at`.
        """
        self.columns = torch.cat([self.columns, rows], dim=1)
        self.num_rows += rows.numel() * len(self.layers)
        arguments: dict[int, dict[str, Any]] = {}
        for number, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True), self.first):
            if id(kind) not in arguments:
                arguments[id(kind)] = kind.at(rows, self.columns, is_plain=self.is_plain, visible=visible)
            hidden = layer(hidden, past_key_values=self, use_cache=True, **arguments[id(kind)])
            hidden = self._with_what_is_added(hidden, number, rows)
        return hidden

    def _with_what_is_added(self, hidden: Tensor, number: int, rows: Tensor) -> Tensor:
        added = self.added.get(number)
        if added is None:
            return hidden
        return hidden + added.gather(1, rows.clamp(min=0)[..., None].expand_as(hidden))

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values 'B G Q D/H', and return all of them; transformers' signature."""
        end, start = self.length, self.length - key.shape[2]
        keys, values = self.held.get(layer, (key[:, :, :0], value[:, :, :0]))
        if end > keys.shape[2]:
            self.capacity = max(self.capacity, end + end // 2)
            keys, values = (_with_room(held, start, self.capacity) for held in (keys, values))
            self.held[layer] = keys, values
        keys[:, :, start:end], values[:, :, start:end] = key, value
        return keys[:, :, :end], values[:, :, :end]

    def crop(self, length: int, holes: Tensor | None = None) -> None:
        """Forget all positions from `length` on; the last columns where bool 'B Q' is true hold nothing any more."""
        self.columns = self.columns[:, :length]
        if holes is not None and not self.is_plain:
            old = self.columns[:, length - holes.shape[1] :]
            self.columns = torch.cat(
                [self.columns[:, : length - holes.shape[1]], old.masked_fill(holes, -1)], dim=1
            )

    def keep(self, num_last: int, places: Tensor) -> None:
        """Keep of the last `num_last` columns `places` 'B Q' alone, in this order; -1: nothing for a sample."""
        start = self.length - num_last
        at = start + places.clamp(min=0)
        for of_layer in self.held.values():
            for held in of_layer:
                index = at[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                held[:, :, start : start + at.shape[1]] = held.gather(2, index)
        kept = self.columns.gather(1, at).masked_fill(places < 0, -1)
        self.columns = torch.cat([self.columns[:, :start], kept], dim=1)


def _with_room(held: Tensor, length: int, capacity: int) -> Tensor:
    """Return a copy of the first positions of 'B G C D/H' with room for `capacity`."""
    wider = held.new_empty(*held.shape[:2], capacity, held.shape[3])
    wider[:, :, :length] = held[:, :, :length]
    return wider
