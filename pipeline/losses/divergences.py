"""Divergences between two next-token distributions, from a teacher's top K, its tail's mass, and draws from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.targets.vocabulary import SMALLEST_LOG_PROBABILITY, AnswerScores

# How fast the control variate of `within_tail` fades as the student leaves the teacher. Any value is unbiased;
# 3 to 30 are equally noisy (docs/decisions.md).
CONTROL_DECAY = 10.0


def buckets(
    scores: AnswerScores, top_log_probs: Tensor, tail_log_prob: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's tempered log probabilities over the same buckets, the last one the tail.

    `scores` are the student's, `top_log_probs` 'A K' and `tail_log_prob` 'A' the teacher's. Returns float32 'A K+1'
    twice; 'A V' where K is V, because there an empty tail bucket would gain mass when tempered.
    """
    ours, theirs = scores.top, top_log_probs.float()
    if len(scores.tail):
        ours = torch.cat([ours, scores.tail[:, None]], dim=1)
        theirs = torch.cat([theirs, tail_log_prob[:, None].float()], dim=1)
    ours, theirs = (x.clamp(min=SMALLEST_LOG_PROBABILITY) / temperature for x in (ours, theirs))
    return ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, from log probabilities over the last axis."""
    return (p.exp() * (p - q)).sum(dim=-1)


def jensen_shannon(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in nats, from log probabilities over the last axis."""
    # logaddexp: the mean of two probabilities is taken without leaving the log domain, where small ones survive.
    middle = torch.logaddexp(ours, theirs) - torch.log(torch.tensor(2.0))
    return 0.5 * (kl(ours, middle) + kl(theirs, middle))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse": lambda ours, theirs: kl(ours, theirs),
    "forward": lambda ours, theirs: kl(theirs, ours),
    "jsd": jensen_shannon,
}


def within_tail(ours: Tensor, theirs: Tensor, our_draws: Tensor, their_draws: Tensor) -> Tensor:
    """Return an unbiased estimate 'A', in nats, of what KL(teacher || student) of buckets lacks at temperature 1.

    By the chain rule that is t KL(p || q): t is the teacher's mass outside its top K, p and q are both sides'
    distributions there. `ours` and `theirs` are the buckets 'A K+1', `our_draws` and `their_draws` the log
    probabilities 'A Z' of draws from p. The mean of log p/q over the draws is unbiased (random-sampling distillation,
    arXiv 2503.16870), but noisy where p is close to q. So c (q/p - 1) is added, which has mean 0 under p for any c.
    With c = 1, value and gradient are exactly 0 at p = q (Schulman, "Approximating KL divergence", the estimator k3).
    Far from there the added term is noise itself, so c falls as the buckets grow apart.
    """
    log_ratio = (our_draws - ours[:, -1:]) - (their_draws.float() - theirs[:, -1:])
    # Detached: the gradient through c has mean 0 and would only add noise.
    control = torch.exp(-CONTROL_DECAY * kl(theirs, ours).detach())[:, None]
    # A ratio beyond e^30 means that the teacher's probability was clamped when it was stored.
    ratio = log_ratio.clamp(max=-SMALLEST_LOG_PROBABILITY).exp()
    return theirs[:, -1].exp() * (control * (ratio - 1) - log_ratio).mean(dim=-1)
