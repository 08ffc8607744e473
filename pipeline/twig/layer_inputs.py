"""What a family's decoder gives to each of its layers: masks and rotary positions, recorded once for all its rows.

A twig, pruning and speculation run some layers, on some positions, in another order than the decoder does. They call
the layers themselves. What the layers get besides hidden states is the family's own: its forward runs once over the
whole sequence, the room for new tokens included, with layers that record their arguments in place of computing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

# What the callers of layers decide, or what layers on SDPA do not read.
NOT_RECORDED = ("past_key_values", "use_cache", "position_ids", "cache_position")


@dataclass(frozen=True, eq=False)
class LayerKind:
    """The arguments of all layers of one kind: full or windowed attention have their own.

    `mask` is bool 'B|1 1 S S', None where it is causal. `rotary` are the cosines and sines, '... B|1 S D/H'. `others`
    are plain values.
    """

    mask: Tensor | None
    rotary: tuple[Tensor, ...]
    others: Mapping[str, Any]

    def rotated(self, places: Tensor | None) -> LayerKind:
        """Return it with every column rotated as column `places` 'B S' is; None: as it is."""
        if places is None:
            return self
        return replace(self, rotary=tuple(_rows_of(values, places) for values in self.rotary))

    def whole(self) -> dict[str, Any]:
        """Return a layer's arguments for the whole sequence."""
        return {"attention_mask": self.mask, "position_embeddings": self.rotary, **self.others}

    def at(
        self, rows: Tensor, columns: Tensor, *, is_plain: bool, visible: Tensor | None = None
    ) -> dict[str, Any]:
        """Return a layer's arguments for the positions `rows` 'B Q', whose keys are those of `columns` 'B C'.

        Both are positions of the sequence, -1 where there is none: no row sees such a column. `is_plain` says that
        there is none, in a batch of one. The last Q columns are the rows themselves. `visible` bool 'B q c' says
        which of the last c columns the last q rows may see: a drafted node of a tree sees its ancestors and itself.
        """
        places = rows.clamp(min=0)
        rotary = tuple(_rows_of(values, places) for values in self.rotary)
        return {
            "attention_mask": self._mask(rows, columns, is_plain, visible),
            "position_embeddings": rotary,
            **self.others,
        }

    def _mask(self, rows: Tensor, columns: Tensor, is_plain: bool, narrowed: Tensor | None) -> Tensor | None:
        is_whole = narrowed is None and is_plain and rows.shape[1] in (1, columns.shape[1])
        if self.mask is None and is_whole:
            return None  # one row sees all keys; rows without other keys are causal among themselves
        seen, at = columns[:, None, None, :], rows[:, None, :, None]
        if self.mask is None:
            visible = seen <= at
        else:
            of_all = self.mask.expand(len(rows), -1, -1, -1)
            of_rows = of_all.gather(2, at.clamp(min=0).expand(-1, -1, -1, of_all.shape[3]))
            visible = of_rows.gather(3, seen.clamp(min=0).expand(-1, -1, rows.shape[1], -1))
        visible = visible & (seen >= 0)
        if narrowed is not None:
            visible[:, 0, -narrowed.shape[1] :, -narrowed.shape[2] :] &= narrowed
        # A row without a position sees all, so that its values are finite; nothing ever reads them.
        return visible | (at < 0)


def _places_without_padding(network: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return each column's distance 'B S' from the first one of its sample that is not padding; None for no padding.

    A family that counts columns gives a prompt that is padded on the left other angles than in training. Attention
    does not change with that, because it reads differences of angles alone, but a pruning head's gates do.
    """
    mask = inputs.get("attention_mask")
    if mask is None or hasattr(network.base_model, "get_rope_index"):  # which does not count padding
        return None
    starts = mask.int().argmax(dim=1)
    if not bool(starts.any()):
        return None
    return (torch.arange(mask.shape[1], device=mask.device) - starts[:, None]).clamp(min=0)


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Return the rows 'B Q' of '... B|1 S D' along S: '... B Q D'."""
    values = values.expand(*values.shape[:-3], len(rows), *values.shape[-2:])
    index = rows[..., None].expand(*values.shape[:-2], rows.shape[1], values.shape[-1])
    return values.gather(-2, index)


@dataclass(frozen=True)
class LayerInputs:
    """A recorded forward: the input of the first layer, and the arguments of every layer.

    `embeds` 'B S D'. `kinds` has an entry a layer; layers of one kind share it. `added` holds what the decoder adds
    to the output of a layer, 'B S D' by the layer's number: Qwen3-VL's deepstack features.
    """

    embeds: Tensor
    kinds: Sequence[LayerKind]
    added: Mapping[int, Tensor]

    @classmethod
    def record(cls, network: Any, inputs: Mapping[str, Any]) -> LayerInputs:
        """Run the family's forward over `inputs`, its arguments, without its layers.

        Raises `ConfigError` if its layers get something that cannot be cut to some of the rows.
        """
        layers = network.get_decoder().layers
        with _recording(layers) as calls:
            network(**{**inputs, "use_cache": False})
        # A layer returned `nothing`, so another input of the next one is what the decoder added to it.
        added = {n: call.hidden for n, call in enumerate(calls[1:]) if call.hidden is not calls[0].nothing}
        kinds: dict[tuple[int, int], LayerKind] = {}
        places = _places_without_padding(network, inputs)
        for call in calls:
            if call.kind not in kinds:
                kinds[call.kind] = _kind(call.arguments).rotated(places)
        return cls(calls[0].hidden, [kinds[call.kind] for call in calls], added)


@dataclass(frozen=True, eq=False)
class _Call:
    """What a layer got, and `nothing`: the zeros that it returned."""

    hidden: Tensor
    arguments: Mapping[str, Any]
    nothing: Tensor

    @property
    def kind(self) -> tuple[int, int]:
        """The same for layers that got the same objects."""
        return id(self.arguments["attention_mask"]), id(self.arguments["position_embeddings"])


def _kind(arguments: Mapping[str, Any]) -> LayerKind:
    mask, rotary = arguments["attention_mask"], arguments["position_embeddings"]
    known = (*NOT_RECORDED, "attention_mask", "position_embeddings")
    others = {name: value for name, value in arguments.items() if name not in known}
    if strange := [name for name, value in others.items() if isinstance(value, Tensor | tuple | list | dict)]:
        raise ConfigError(f"twig: the family's layers get {strange[0]!r}, which cannot be cut to some rows")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        raise ConfigError(
            f"twig: the family's layers get a mask of {mask.dtype} {tuple(mask.shape)}; a bool mask 'B 1 S S' was "
            "expected"
        )
    return LayerKind(mask, tuple(rotary), others)


class _Recorded(Exception):  # noqa: N818 - it ends a forward, and is no error
    """All layers have recorded their arguments."""


@contextmanager
def _recording(layers: nn.ModuleList) -> Iterator[list[_Call]]:
    """Let the layers record what they get, and return zeros; the last one ends the forward."""
    calls: list[_Call] = []

    def record(hidden_states: Tensor, **arguments: Any) -> Tensor:
        nothing = calls[0].nothing if calls else torch.zeros_like(hidden_states)
        calls.append(_Call(hidden_states, arguments, nothing))
        if len(calls) == len(layers):
            raise _Recorded
        return nothing

    before = [layer.__dict__.get("forward") for layer in layers]  # accelerate's hooks have one, too
    for layer in layers:
        layer.forward = record  # an attribute of the instance hides the class's own
    try:
        yield calls
    except _Recorded:
        pass
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
