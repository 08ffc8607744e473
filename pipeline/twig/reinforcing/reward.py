"""The reward of a choice of vision tokens: how probable the base finds the answer after pruning to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.positions import IGNORE_INDEX
from pipeline.twig.base import Base
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs, LayerKind


class PrunedBase:
    """Layers K to L-1 of a base, which continue stored hidden states with some of the vision tokens.

    No module, so that whoever holds it does not train or save it.
    """

    def __init__(self, base: Base, geometry: Geometry):
        self.base, self.geometry = base, geometry

    @torch.no_grad()
    def rewards(
        self, hidden: Tensor, inputs: LayerInputs, batch: Mapping[str, Any], kept: list[Tensor]
    ) -> Tensor:
        """Return the mean log probability of each sample's answer, float32 'B G', of each of its G choices.

        `hidden` 'B S D' is the output of layer K, and `kept[b]` int64 'G R' are the positions that stay of a sample's
        vision tokens. A choice is dropped to before layer K, and all vision tokens before layer Kf. Raises
        `ConfigError` for a base that adds image features to outputs of these layers, which no store holds.
        """
        if any(layer >= self.geometry.attach_layer for layer in inputs.added):
            raise ConfigError(
                f"losses.policy: the base adds features of images to the output of layer {max(inputs.added)}, which "
                f"the store does not hold; set twig.attach_layer to {max(inputs.added) + 1} or more"
            )
        return torch.stack([
            self._of_sample(hidden[b], _kinds_of(inputs, b), {name: batch[name][b] for name in PLACES}, choices)
            for b, choices in enumerate(kept)
        ])  # fmt: skip

    def _of_sample(
        self, hidden: Tensor, kinds: list[LayerKind], places: Mapping[str, Tensor], choices: Tensor
    ) -> Tensor:
        """Return the rewards 'G' of one sample's choices 'G R', from its hidden states 'S D'."""
        labels = torch.nn.functional.pad(places["labels"][1:], (0, 1), value=IGNORE_INDEX)
        predicts = labels != IGNORE_INDEX
        # A position that predicts a token of the answer stays, whatever it is.
        stays = places["attention_mask"].bool() & (~places["is_vision"] | predicts)
        text = stays.nonzero()[:, 0].expand(len(choices), -1)
        rows = torch.cat([text, choices], dim=1).sort(dim=1).values
        states = self._run(hidden[rows], rows, kinds, self.geometry.attach_layer, self.geometry.wipe_layer)
        if self.geometry.wipe_layer < self.geometry.num_base_layers:
            is_text = stays[rows]
            states, rows = states[is_text].view(*text.shape, -1), text
            states = self._run(states, rows, kinds, self.geometry.wipe_layer, self.geometry.num_base_layers)
        if not bool(predicts.any()):
            return hidden.new_zeros(len(choices), dtype=torch.float32)
        is_asked = predicts[rows]
        logits = self.base.logits(states[is_asked]).view(len(choices), int(predicts.sum()), -1)
        log_probs = logits.float().log_softmax(dim=-1)
        return log_probs.gather(2, labels[predicts].expand(len(choices), -1)[..., None])[..., 0].mean(dim=1)

    def _run(self, hidden: Tensor, rows: Tensor, kinds: list[LayerKind], first: int, last: int) -> Tensor:
        """Run base layers `first` to `last`-1 on the positions 'G Q': 'G Q D' -> 'G Q D'."""
        arguments = {id(kind): kind.at(rows, rows, is_plain=False) for kind in kinds[first:last]}
        for layer, kind in zip(self.base.layers[first:last], kinds[first:last], strict=True):
            hidden = layer(hidden, **arguments[id(kind)])
        return hidden


PLACES = ("labels", "is_vision", "attention_mask")


def _kinds_of(inputs: LayerInputs, sample: int) -> list[LayerKind]:
    """Return the arguments of every layer for one sample of a batch."""
    of_one = {id(kind): _of_sample(kind, sample) for kind in inputs.kinds}
    return [of_one[id(kind)] for kind in inputs.kinds]


def _of_sample(kind: LayerKind, sample: int) -> LayerKind:
    mask = kind.mask if kind.mask is None or len(kind.mask) == 1 else kind.mask[sample : sample + 1]
    rotary = tuple(one if one.shape[-3] == 1 else one[..., sample : sample + 1, :, :] for one in kind.rotary)
    return replace(kind, mask=mask, rotary=rotary)
