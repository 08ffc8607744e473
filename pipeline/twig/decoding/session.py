"""A batch that is being answered: the base's layers in groups, with the caches of each, and the twig's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.positions import Slots, find_slots
from pipeline.twig.base import Base
from pipeline.twig.decoding.layer_group import LayerGroup
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.pruning import compacted, kept_tokens
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.module import Twig

MOST_DRAFTS = 16  # drafts for which a cache has room at first, beside the new tokens


class Session:
    """The layer groups of one batch, from its prompts to its last token.

    `shallow` are base layers 0..K-1, shared by drafts and verification. `own` are the twig's layers, which see every
    vision token. `middle` are base layers K..Kf-1, which see the kept ones, and `deep` are Kf..L-1, which see none.
    Without pruning the last two see all.
    """

    def __init__(self, base: Base, twig: Twig | None, prompts: Prompts, *, first: int, wipe: int, room: int):
        self.base, self.twig, self.prompts = base, twig, prompts
        family = base.network.config.model_type
        inputs = LayerInputs.record(base.network, prompts.extended(room, family))
        self.embeds = inputs.embeds[:, : prompts.length]
        of_all = {"capacity": prompts.length + room + MOST_DRAFTS, "is_plain": prompts.is_plain}
        self.shallow = LayerGroup(base.layers[:first], 0, inputs, **of_all)
        self.middle = LayerGroup(base.layers[first:wipe], first, inputs, **of_all)
        self.deep = LayerGroup(base.layers[wipe:], wipe, inputs, **of_all)
        self.own: LayerGroup | None = None
        if twig is not None:  # it was trained without what the decoder adds to the base's layers
            self.own = LayerGroup(twig.layers, first, replace(inputs, added={}), **of_all)
        self.is_wiped = False
        self.num_logits = {"head": 0, "own_head": 0}  # positions that were put through the heads so far
        # What is confirmed and not yet through the middle and deep layers: outputs of layer K 'B Q D' and their rows.
        self.pending: tuple[Tensor, Tensor]

    @property
    def groups(self) -> Mapping[str, LayerGroup]:
        """The groups of the base, by name."""
        return {"shallow": self.shallow, "middle": self.middle, "deep": self.deep}

    @cached_property
    def slots(self) -> Slots:
        """Where the prompts' vision tokens are; `text` is not used."""
        return find_slots(self.prompts.is_vision, self.prompts.inputs["attention_mask"])

    def read_prompts(self) -> Tensor:
        """Run the prompts through the shallow layers; all of it is pending then. Return the outputs 'B P D'."""
        rows = self.prompts.rows
        states = self.shallow.run(self.embeds, rows)
        self.pending = (states, rows)
        return states

    def read_with_twig(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Run the twig over the prompts. Return its output at the last position 'B D', and its scores 'B J'.

        A score says how the last prompt position attends to a vision token (`Twig.scoring`).
        """
        assert self.own is not None and self.twig is not None
        with self.twig.scoring() as scores:
            hidden = self.own.run(states, self.prompts.rows)
        at = torch.full((len(hidden),), self.prompts.length - 1, device=hidden.device)
        return hidden[:, -1], scores(at, self.slots.vision)

    def prune(self, scores: Tensor, counts: list[int]) -> None:
        """Drop all but `counts` vision tokens of each sample from what is pending, and all before the deep layers."""
        states, rows = self.pending
        kept = kept_tokens(scores, self.slots.vision, counts, self.prompts.length)
        stays = (~self.prompts.is_vision | kept | _is_last(rows)) & (rows >= 0)
        self.pending = compacted(states, rows, stays)
        self.is_wiped = True

    def read_tokens(self, tokens: Tensor, rows: Tensor, visible: Tensor | None = None) -> Tensor:
        """Run new tokens 'B Q' at positions `rows` (-1: none) through the shallow layers: outputs 'B Q D'."""
        return self.shallow.run(self.base.embeddings(tokens), rows, visible)

    def verify(self, states: list[Tensor], rows: list[Tensor], visible: Tensor | None = None) -> Tensor:
        """Run what is pending and the drafts through middle and deep layers, in one pass.

        Return the base's logits 'B n+1 V' at the last pending position and at the n drafts. `visible` bool 'B n n':
        which drafts each of them sees; None: all before it.
        """
        num_drafts = sum(part.shape[1] for part in rows)
        hidden = torch.cat([self.pending[0], *states], dim=1)
        at = torch.cat([self.pending[1], *rows], dim=1)
        hidden = self.middle.run(hidden, at, visible)
        if self.is_wiped and self.deep.layers and self.deep.length == 0:
            hidden, at = self._wiped(hidden, at)
        hidden = self.deep.run(hidden, at, visible)
        self.num_logits["head"] += len(hidden) * (num_drafts + 1)
        return self.base.logits(hidden[:, -(num_drafts + 1) :])

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Return the twig's logits '... V' of its last layer's output '... D', of its `draft_ids` if it has some."""
        assert self.twig is not None
        self.num_logits["own_head"] += hidden.shape[:-1].numel()
        return self.twig.draft_logits(hidden)

    def _wiped(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        prompt = rows.clamp(max=self.prompts.length - 1)
        is_vision = self.prompts.is_vision.gather(1, prompt.clamp(min=0)) & (rows < self.prompts.length)
        # Drafts stay, those without a position, too: the logits are read from the last rows. So is the prompts' end.
        is_kept = torch.arange(rows.shape[1], device=rows.device) >= self.pending[1].shape[1] - 1
        return compacted(hidden, rows, is_kept | (~is_vision & (rows >= 0)))

    def num_rows(self) -> dict[str, int]:
        """Return the positions of all samples that each group of layers, times its layers, and each head computed."""
        groups = {**self.groups} | ({} if self.own is None else {"own": self.own})
        return {name: group.num_rows for name, group in groups.items()} | self.num_logits

    def confirm(self, accepted: Tensor) -> None:
        """Forget the drafts that were rejected: bool 'B n', of the last n positions of the base's groups."""
        for group in self.groups.values():
            if group.layers:
                _confirm(group, accepted)

    def confirm_own(self, accepted: Tensor) -> None:
        """Forget them in the twig's cache, which has seen the first of the drafts only: bool 'B n'."""
        assert self.own is not None
        _confirm(self.own, accepted)


def _confirm(group: LayerGroup, accepted: Tensor) -> None:
    num_drafts = accepted.shape[1]
    used = int(accepted.any(dim=0).long().cumsum(0).argmax()) + 1 if bool(accepted.any()) else 0
    group.crop(group.length - num_drafts + used, ~accepted[:, :used])


def _is_last(rows: Tensor) -> Tensor:
    """Return where the last column of rows 'B Q' is, bool 'Q': the next token is read from there, whatever it is."""
    return torch.arange(rows.shape[1], device=rows.device) == rows.shape[1] - 1
