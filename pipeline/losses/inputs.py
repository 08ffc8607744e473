"""What the losses compare: the student's outputs of a batch, and the teacher's targets for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.positions import Slots
from pipeline.targets.vocabulary import AnswerScores

Result = tuple[Tensor, Tensor]  # a loss's sum, and its count
Head = nn.Module | None
Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's targets for a batch, padded like the batch itself. Absent targets are None or empty.

    `attention`       layer -> float32 'B H T J', rows as in `Slots.text`, columns as in `Slots.vision`;
                      H is 1 for a mean over heads
    `vision`          float32 'G D', the vision tokens of all images of the batch in order
    `top_ids`         int64 'A K', with `top_log_probs` float32 'A K'
    `tail_log_prob`   float32 'A', log of the probability outside the top K
    `draw_ids`        int64 'A Z', tokens drawn from there, with `draw_log_probs` float32 'A Z'
    `hidden_states`   float32 'B S D', the output of the teacher's first layers; zeros at the padding
    `final_hidden`    float32 'A D', what the teacher's head gets at the answers
    `query_attention` float32 'B H J', the last prompt position's attention over the vision columns alone
    """

    attention: Mapping[int, Tensor] = field(default_factory=dict)
    vision: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    tail_log_prob: Tensor | None = None
    draw_ids: Tensor | None = None
    draw_log_probs: Tensor | None = None
    hidden_states: Tensor | None = None
    final_hidden: Tensor | None = None
    query_attention: Tensor | None = None


@dataclass(frozen=True)
class Actions:
    """A group of choices of each sample: their log probabilities, with gradient, and rewards; float32 'B G'.

    `entropy` 'B' is that of the scores, in nats, and `overlap` 'B' the share of the tokens with the largest scores
    that a drawn choice keeps.
    """

    log_probs: Tensor
    rewards: Tensor
    entropy: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class StudentOutputs:
    """The student's outputs for a batch.

    `scores`     log probabilities of the labels and of the tokens that the teacher's targets name, at the answers
    `attention`  layer -> float32 'B H T J'
    `vision`     'G D', projected vision features of all images in order

    Of a twig alone:
    `logits`        'A V' at the answers
    `vision_scores` float32 'B J', of its pruning head, from the last prompt positions
    `asks`          bool 'B', whether that position follows a vision token
    `actions`       choices of vision tokens with their rewards, where these are learned from
    """

    scores: AnswerScores
    slots: Slots
    vision: Tensor | None = None
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    vision_scores: Tensor | None = None
    asks: Tensor | None = None
    actions: Actions | None = None


def count_of(count: int, like: Tensor) -> Tensor:
    """Return a loss's count, on the device of a tensor of the batch."""
    return torch.tensor(count, dtype=torch.float32, device=like.device)
