"""How far two next-token distributions are apart, from a teacher's top K, the mass of its tail, and draws from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.targets.vocabulary import SMALLEST_LOG_PROBABILITY, AnswerScores

# How fast the control variate of `within_tail` is let go as the student leaves the teacher: any value is unbiased,
# and 3 to 30 are alike in noise (docs/decisions.md).
CONTROL_DECAY = 10.0


def buckets(
    scores: AnswerScores, top_log_probs: Tensor, tail_log_prob: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's tempered log probabilities over the same buckets, the last one the tail.

    `scores` are the student's; the teacher's are 'A K' and 'A'. Returns float32 'A K+1' twice, or 'A V' where K is V:
    without a tail, a bucket of nothing would gain mass when tempered.
    """
    ours, theirs = scores.top, top_log_probs.float()
    if len(scores.tail):
        ours = torch.cat([ours, scores.tail[:, None]], dim=1)
        theirs = torch.cat([theirs, tail_log_prob[:, None].float()], dim=1)
    ours, theirs = (x.clamp(min=SMALLEST_LOG_PROBABILITY) / temperature for x in (ours, theirs))
    return ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats, of log probabilities over the last axis."""
    return (p.exp() * (p - q)).sum(dim=-1)


def jensen_shannon(ours: Tensor, theirs: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in nats, of log probabilities over the last axis."""
    middle = torch.logaddexp(ours, theirs) - torch.log(torch.tensor(2.0))
    return 0.5 * (kl(ours, middle) + kl(theirs, middle))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse": lambda ours, theirs: kl(ours, theirs),
    "forward": lambda ours, theirs: kl(theirs, ours),
    "jsd": jensen_shannon,
}


def within_tail(ours: Tensor, theirs: Tensor, our_draws: Tensor, their_draws: Tensor) -> Tensor:
    """What KL(teacher || student) of buckets at temperature 1 lacks of the whole: an unbiased estimate 'A', in nats.

    By the chain rule that is t KL(p || q), t the teacher's mass outside its top K, p and q both sides' distributions
    there. `ours`, `theirs` are the buckets 'A K+1', `our_draws`, `their_draws` log probabilities 'A Z' of draws from
    p. The mean of log p/q over draws is unbiased (random-sampling distillation, arXiv 2503.16870), but noisy where p
    is close to q. So c (q/p - 1) is added, of mean 0 under p for any c: with c = 1 value and gradient are exactly 0
    at p = q (Schulman, "Approximating KL divergence", the estimator k3), far from there it is noise itself, so c
    falls as the buckets grow apart.
    """
    log_ratio = (our_draws - ours[:, -1:]) - (their_draws.float() - theirs[:, -1:])
    control = torch.exp(-CONTROL_DECAY * kl(theirs, ours).detach())[:, None]
    # What a ratio beyond e^30 says is that the teacher's probability is not known.
    ratio = log_ratio.clamp(max=-SMALLEST_LOG_PROBABILITY).exp()
    return theirs[:, -1].exp() * (control * (ratio - 1) - log_ratio).mean(dim=-1)
