"""A step of the pruning head's training: choices of vision tokens, and their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.losses.inputs import Actions
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.reinforcing.ranking import draw_rankings, log_probability, log_shares
from pipeline.twig.reinforcing.reward import PrunedBase


class Exploring:
    """What draws choices from a pruning head's scores, and asks the pruned base about them.

    `shares` are the candidate budgets, each as `Geometry.num_kept` takes it. A choice is of `group` of a sample.
    """

    def __init__(self, base: PrunedBase, shares: Sequence[float], *, group: int, annealing: float):
        self.base, self.shares, self.group, self.annealing = base, sorted(shares), group, annealing

    @property
    def geometry(self) -> Geometry:
        return self.base.geometry

    def actions(
        self,
        scores: Tensor,
        slots: Tensor,
        hidden: Tensor,
        inputs: LayerInputs,
        batch: Mapping[str, Any],
        *,
        seen: Tensor,
        draws: bool,
        progress: float,
    ) -> Actions:
        """Return choices of each sample with their rewards, from `scores` of its vision tokens at `slots`, 'B J'.

        `hidden` 'B S D' is the output of layer K; tokens that are `seen`, bool 'B J', may be chosen. With `draws` the
        choices are a group of drawn ones at a drawn budget; without, the one of the largest scores at the smallest
        budget, which is what decoding does. `progress` is the part of the training that is done, from 0 to 1.
        """
        counts = self._counts(seen, self._drawn_share(progress) if draws else self.shares[0])
        logs = log_shares(scores, seen)
        best = logs.detach().sort(dim=1, descending=True, stable=True).indices[:, None]
        rankings = draw_rankings(logs.detach(), self.group) if draws else best
        kept = [
            of_sample[ranking[:, :count]]
            for of_sample, ranking, count in zip(slots, rankings, counts.tolist(), strict=True)
        ]
        return Actions(
            log_probability(logs, rankings, counts),
            self.base.rewards(hidden, inputs, batch, kept),
            entropy=-(scores.detach() * logs.detach().clamp(min=-100)).sum(dim=1),
            overlap=_overlap(rankings, best, counts),
        )

    def _drawn_share(self, progress: float) -> float:
        """Return a budget: P(i) ~ exp(-b i) with b = annealing progress^2, all alike at first, then the smallest."""
        falls = self.annealing * progress**2
        weights = torch.exp(-falls * torch.arange(len(self.shares), dtype=torch.float64))
        return self.shares[int(torch.multinomial(weights, 1))]

    def _counts(self, seen: Tensor, share: float) -> Tensor:
        """Return R of each sample, int64 'B'; 0 where nothing can be drawn."""
        numbers = seen.sum(dim=1).tolist()
        counts = [self.geometry.num_kept(number, share) if number else 0 for number in numbers]
        return torch.tensor(counts, device=seen.device)


def _overlap(rankings: Tensor, best: Tensor, counts: Tensor) -> Tensor:
    """Return the share of the first `counts` 'B' of `best` 'B 1 J' that the first of `rankings` 'B G J' hold: 'B'."""
    place = torch.arange(rankings.shape[2], device=rankings.device)
    is_first = (place < counts[:, None, None]).expand_as(rankings)
    drawn = torch.zeros_like(is_first).scatter(2, rankings, is_first)
    of_best = torch.zeros_like(is_first[:, :1]).scatter(2, best, is_first[:, :1])
    return (drawn & of_best).sum(dim=2).float().mean(dim=1) / counts.clamp(min=1)
