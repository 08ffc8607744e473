"""How a token is chosen, and a draft accepted: greedily, or by sampling with rejection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores '... V' -> scores in which the tokens that may not be drawn are -inf: temperature, top-k, top-p.
Warp = Callable[[Tensor], Tensor]


def _as_they_are(scores: Tensor) -> Tensor:
    return scores


@dataclass(frozen=True)
class Drafted:
    """One drafted token of each sample: `tokens` int64 'B', its probability 'B', and all probabilities 'B V'.

    `probs` are None where the draft was not drawn at random.
    """

    tokens: Tensor
    confidence: Tensor
    probs: Tensor | None


class Verdict(ABC):
    """The base's word on the drafts of a batch; `place` counts the positions whose logits it was given."""

    @abstractmethod
    def accepts(self, sample: int, place: int, token: int, probs: Tensor | None) -> bool:
        """Return whether a token, drafted from `probs` 'V' (None: surely this one), may follow at a place."""

    @abstractmethod
    def following(self, sample: int, place: int, rejected: tuple[int, Tensor | None] | None) -> int:
        """Return the base's own token at a place, after the draft (token, `probs`) that it rejected there, if any."""


@dataclass(frozen=True)
class Choice(ABC):
    """A rule for choosing tokens; `warp` shapes the scores of the base and of its drafts."""

    warp: Warp = _as_they_are

    @abstractmethod
    def draft(self, logits: Tensor) -> Drafted:
        """Choose a token of each sample from logits 'B V'."""

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return log probabilities, float32 '... V', of logits '... V'."""
        return self.warp(logits.float()).log_softmax(dim=-1)

    @abstractmethod
    def judge(self, logits: Tensor) -> Verdict:
        """Return what the base says to drafts, from its logits 'B Q V'."""


@dataclass(frozen=True)
class Greedy(Choice):
    """The most probable token; a draft is accepted if it is the base's own."""

    def draft(self, logits: Tensor) -> Drafted:
        # float32: the probability is compared with a threshold.
        largest, tokens = self.warp(logits).float().softmax(dim=-1).max(dim=-1)
        return Drafted(tokens, largest, None)

    def judge(self, logits: Tensor) -> Verdict:
        return _GreedyVerdict(self.warp(logits).argmax(dim=-1).tolist())


@dataclass(frozen=True)
class _GreedyVerdict(Verdict):
    best: Sequence[Sequence[int]]

    def accepts(self, sample: int, place: int, token: int, probs: Tensor | None) -> bool:
        return self.best[sample][place] == token

    def following(self, sample: int, place: int, rejected: tuple[int, Tensor | None] | None) -> int:
        return self.best[sample][place]


@dataclass(frozen=True)
class Sampling(Choice):
    """Tokens drawn at random; the text has the distribution of the base's own (Leviathan et al., arXiv 2211.17192).

    A draft t from q is accepted with probability min(1, p(t) / q(t)); after a rejection the token is drawn from
    max(p - q, 0), normalised.
    """

    generator: torch.Generator | None = None

    def draft(self, logits: Tensor) -> Drafted:
        probs = self._probabilities(logits)
        tokens = torch.multinomial(probs, 1, generator=self.generator)
        return Drafted(tokens[:, 0], probs.gather(1, tokens)[:, 0], probs)

    def judge(self, logits: Tensor) -> Verdict:
        flat = self._probabilities(logits.flatten(0, 1))
        return _SampledVerdict(flat.view(logits.shape), self.generator)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return self.warp(logits.float()).softmax(dim=-1)


@dataclass(frozen=True)
class _SampledVerdict(Verdict):
    probs: Tensor
    generator: torch.Generator | None

    def accepts(self, sample: int, place: int, token: int, probs: Tensor | None) -> bool:
        drawn_from = 1.0 if probs is None else float(probs[token])
        uniform = float(torch.rand((), generator=self.generator, device=self.probs.device))
        return uniform * drawn_from < float(self.probs[sample, place, token])

    def following(self, sample: int, place: int, rejected: tuple[int, Tensor | None] | None) -> int:
        probs = self.probs[sample, place]
        if rejected is not None:
            token, drawn_from = rejected
            if drawn_from is None:
                probs = probs.clone()
                probs[token] = 0
            else:
                probs = (probs - drawn_from).clamp(min=0)
        return int(torch.multinomial(probs, 1, generator=self.generator))
