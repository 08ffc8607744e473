"""The losses that train a twig to be like its whole base (TwigVLM++), in `LOSSES` beside those of students."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from pipeline.losses.divergences import kl
from pipeline.losses.inputs import Head, Result, StudentOutputs, TeacherTargets, Weight, count_of
from pipeline.settings import Section

# Smaller shares of attention are raised to this, on both sides, so that equal ones stay equal.
SMALLEST_SHARE = 1e-9
SMALLEST_SPREAD = 1e-6  # added to the spread of a group's rewards, which may all be equal


class QueryAttentionLoss(Section):
    """KL of a twig's scores of vision tokens from the attention of one layer of its base (AttnKL)."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""


def query_attention(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """KL(teacher || twig) over the vision tokens, in nats; counts samples whose last prompt position follows any.

    The teacher's side is the mean over heads of a softmax over the vision tokens alone, which also the scores are.
    """
    assert student.vision_scores is not None and student.asks is not None
    assert teacher.query_attention is not None
    theirs, ours = teacher.query_attention.float().mean(dim=1), student.vision_scores.float()
    theirs, ours = (shares.clamp(min=SMALLEST_SHARE) for shares in (theirs, ours))
    # Padding has the smallest share on both sides, which adds nothing.
    total = (kl(theirs.log(), ours.log()) * student.asks).sum()
    return total, count_of(int(student.asks.sum()), total)


class PredictionLoss(Section):
    """KL of a twig's next-token distribution from its base's, over the whole vocabulary (PredKL)."""

    weight: Weight = 0.1
    """Weight of the term in the loss. [factor; stage 2; run]"""
    temperature: float = Field(default=5.0, gt=0)
    """Temperature of both distributions. [factor; stage 2; run]"""
    clip: float | None = Field(default=4.0, gt=0)
    """A position of a larger KL counts as much as one of this KL, and the term is divided by it; null: no limit.
    [nats; stage 2; run]"""


def prediction(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """T^2 KL(teacher || twig) of the tempered distributions; counts answer positions 'A'.

    `head` is the teacher's own, which makes its logits of its last hidden states. A position's value k above `clip`
    is scaled by clip / k, which has no gradient, so its gradient shrinks and does not vanish.
    """
    assert student.logits is not None and teacher.final_hidden is not None and head is not None
    with torch.no_grad():
        hidden = teacher.final_hidden
        hidden = hidden.to(next(head.parameters(), hidden).dtype)
        theirs = (head(hidden).float() / settings.temperature).log_softmax(dim=-1)
    ours = (student.logits.float() / settings.temperature).log_softmax(dim=-1)
    per_position = settings.temperature**2 * kl(theirs, ours)
    if settings.clip is not None:
        scale = (settings.clip / per_position.detach().clamp(min=settings.clip)) / settings.clip
        per_position = per_position * scale
    return per_position.sum(), count_of(len(per_position), per_position)


class PolicyLoss(Section):
    """Reinforcement learning of a twig's pruning head: choices of vision tokens after which the base answers well."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""
    group: int = Field(default=32, ge=2)
    """Choices that are drawn of each sample, and compared with each other. [choices; stage 2; run]"""
    keep: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[1 / 9, 2 / 9, 1 / 3], min_length=1)
    """Shares of the vision tokens that may be kept, on average over the layers; one is drawn for each batch.
    [share; stage 2; run]"""
    annealing: float = Field(default=8.0, ge=0)
    """How much the training comes to prefer the smallest share: the i-th larger one has the weight exp(-annealing
    progress^2 i). 0: all alike, always. [factor; stage 2; run]"""
    patience: int | None = Field(default=None, ge=1)
    """Stops after so many held-out losses in a row that were no better than the best; null: never.
    [evaluations; stage 2; run]"""


def policy(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """Minus the log probability of choices, weighted by their advantage; counts samples that ask about an image.

    A choice's advantage is (r - mean) / (std + 1e-6) over its group (TwigVLM++'s Eq. 14 and 15; there is one step for
    each drawn group, so that no ratio of policies is needed). Of a single choice, in evaluation, it is minus the
    reward: the mean log probability of the answer under the pruned base.
    """
    assert student.actions is not None and student.asks is not None
    rewards = student.actions.rewards
    if rewards.shape[1] == 1:
        per_sample = -rewards[:, 0]
    else:
        spread = rewards.std(dim=1, keepdim=True) + SMALLEST_SPREAD
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / spread
        per_sample = -(advantages * student.actions.log_probs).mean(dim=1)
    total = (per_sample * student.asks).sum()
    return total, count_of(int(student.asks.sum()), total)
