"""The training losses. Each returns a float32 sum and a count, and the trainer divides once per optimizer step.

So a loss does not depend on how a step is cut into batches. A loss of the teacher's targets is zero, with zero
gradient, where the student equals the teacher. No loss reads padding, and each is 0 where a batch has nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.losses.divergences import DIVERGENCES, buckets, within_tail
from pipeline.losses.inputs import Head, Result, StudentOutputs, TeacherTargets, Weight, count_of
from pipeline.losses.of_twigs import (
    PolicyLoss,
    PredictionLoss,
    QueryAttentionLoss,
    policy,
    prediction,
    query_attention,
)
from pipeline.positions import Counts, Slots
from pipeline.settings import Section

# Smaller probabilities are raised to this, so that their log is finite; on both sides, so that equal stays equal.
SMALLEST_PROBABILITY = 1e-8

Layer = Annotated[int, Field(ge=0)]


class SupervisedLoss(Section):
    """Cross entropy with the labels."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""


def supervised(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """Cross entropy with the labels; counts answer positions 'A'."""
    total = -student.scores.label.sum()
    return total, count_of(student.scores.label.numel(), total)


class AttentionLoss(Section):
    """Text-to-vision attention of teacher and student."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""
    distance: Literal["kl", "mse"] = "kl"
    """KL of each row, in nats, or the published mean square of the probabilities. [stage 2; run]"""
    heads: Literal["mean", "mix"] = "mean"
    """Compare means over heads, or each student head with a trained mixture of teacher heads. [stage 2; run]"""
    layers: list[tuple[Layer, Layer]] = Field(default=[(0, 0)], min_length=1)
    """Pairs of a teacher's and a student's layer, counted from 0. [layers; stage 1, stage 2; run]"""

    def teacher_layers(self) -> list[int]:
        return [teacher_layer for teacher_layer, _ in self.layers]


def attention(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """Text-to-vision attention of shallow layers (Align-KD's L_attn); counts text rows, over all layer pairs.

    `distance: kl` compares each row as a distribution over its vision tokens and one bucket for all else,
    KL(teacher || student); `mse` is the published mean square of the probabilities. `heads: mean` compares
    head means; `mix` compares each student head with a trained convex mixture of teacher heads.
    """
    real_rows = student.slots.text >= 0
    real = real_rows[:, :, None] & (student.slots.vision >= 0)[:, None, :]
    total = torch.zeros((), dtype=torch.float32, device=real.device)
    count = 0
    for pair, (teacher_layer, student_layer) in enumerate(settings.layers):
        ours = student.attention[student_layer].float()
        theirs = teacher.attention[teacher_layer].float()
        if settings.heads == "mean":
            ours, theirs = ours.mean(dim=1, keepdim=True), theirs.mean(dim=1, keepdim=True)
        else:
            assert head is not None
            theirs = head(theirs, pair)
        row_distance = row_kl if settings.distance == "kl" else _row_mse
        per_row = row_distance(theirs, ours, real[:, None])
        # A padded row has a distance, too, which means nothing.
        total = total + (per_row.mean(dim=1) * real_rows).sum()
        count += int(real_rows.sum())
    return total, count_of(count, total)


def row_kl(teacher: Tensor, student: Tensor, real: Tensor | Literal[True] = True) -> Tensor:
    """Return KL(teacher || student) of rows over J columns and a bucket for all else, in nats: '... T J' -> '... T'.

    `real` is False in padded columns.
    """
    # Without the bucket a row would not sum to 1, and KL could be negative.
    teacher, student = (
        torch.cat([p * real, 1 - (p * real).sum(dim=-1, keepdim=True)], dim=-1).clamp(
            min=SMALLEST_PROBABILITY
        )
        for p in (teacher, student)
    )
    return (teacher * (teacher.log() - student.log())).sum(dim=-1)


def _row_mse(teacher: Tensor, student: Tensor, real: Tensor) -> Tensor:
    """Return the mean square over a row's own columns: 'B H T J' -> 'B H T'."""
    return ((teacher - student).square() * real).sum(dim=-1) / real.sum(dim=-1).clamp(min=1)


class VisionAllLoss(Section):
    """Mean square over all vision tokens, against a trained linear map of the teacher's."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""


def vision_all(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """All projected vision features against a trained linear map of the teacher's (L_V-all); counts images.

    The mean is over the tokens of one image, so that images of many tokens weigh no more than others.
    """
    if teacher.vision is None or not len(teacher.vision):
        return _nothing(student)
    assert head is not None and student.vision is not None
    per_token = _vision_distance(student.vision, head(teacher.vision))
    per_image = torch.stack([of_image.mean() for of_image in per_token.split(list(student.slots.sizes))])
    return per_image.sum(), count_of(len(per_image), per_token)


class VisionFocusLoss(Section):
    """Mean square over the vision tokens of an image that the teacher's text attends most."""

    weight: Weight = 1.0
    """Weight of the term in the loss. [factor; stage 2; run]"""
    k: int = Field(default=16, ge=1)
    """How many vision tokens of an image are compared. [tokens; stage 1, stage 2; run]"""
    layer: Layer = 0
    """The teacher's layer whose attention decides. [layer; stage 2; run]"""

    def teacher_layers(self) -> list[int]:
        return [self.layer]


def vision_focus(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """As `vision_all`, over the k vision tokens of each image that the teacher's text attends most (L_V-focus).

    Counts the images that text follows: an image at the very end of a sample is attended by no text and has no focus.
    """
    if teacher.vision is None or not len(teacher.vision):
        return _nothing(student)
    assert head is not None and student.vision is not None
    per_token = _vision_distance(student.vision, head(teacher.vision))
    focus = focus_tokens(teacher.attention[settings.layer], student.slots, settings.k)
    attended = attended_images(student.slots)
    of_images = per_token.split(list(student.slots.sizes))
    per_image = torch.stack(
        [of_image[chosen].mean() for of_image, chosen in zip(of_images, focus, strict=True)]
    )
    return (per_image * attended).sum(), count_of(int(attended.sum()), per_token)


def focus_tokens(attention: Tensor, slots: Slots, k: int) -> list[Tensor]:
    """Return the k most attended vision tokens of every image, or all of fewer: 'B H T J' -> int64 'k' of each image.

    A token's score is the attention to it: mean over heads, sum over the T text rows.
    """
    real_rows = slots.text >= 0
    mass = (attention.float().mean(dim=1) * real_rows[:, :, None]).sum(dim=1)
    return [of_image.topk(min(k, len(of_image))).indices for of_image in slots.by_image(mass)]


def attended_images(slots: Slots) -> Tensor:
    """Whether any text follows an image, for every image of the batch in order: bool 'I'."""
    # One column of -1, so that a batch without any text row has a maximum, too.
    no_text = slots.text.new_full((len(slots.text), 1), -1)
    last_text = torch.cat([slots.text, no_text], dim=1).amax(dim=1, keepdim=True)
    return torch.stack([of_image[0] for of_image in slots.by_image(slots.vision < last_text)])


def _vision_distance(student: Tensor, target: Tensor) -> Tensor:
    """Mean square over D of every vision token: 'G D' -> 'G'."""
    return (student.float() - target.float()).square().mean(dim=-1)


class LogitsLoss(Section):
    """KL on the answer's next-token distribution, in nats."""

    weight: Weight = 0.1
    """Weight of the term in the loss, low by measurement: at 1 the demo's student lost 7 points.
    [factor; stage 2; run]"""
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    """KL(student, teacher), KL(teacher, student), or the Jensen-Shannon divergence. [stage 2; run]"""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions. [factor; stage 2; run]"""
    tail: Literal["draws", "bucket"] = Field(default="draws", exclude_if=lambda tail: tail == "draws")
    """`draws` uses the tokens that the store drew outside the top K, where there are any and they estimate what is
    asked: `forward` at temperature 1. Elsewhere, and with `bucket`, what is outside counts as one token.
    [stage 2; run]"""

    def uses_draws(self) -> bool:
        return self.tail == "draws" and self.direction == "forward" and self.temperature == 1


def logits(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """KL on the answer's next-token distribution over the teacher's top K and a tail bucket; counts positions.

    Both sides become the same K + 1 buckets, tempered as buckets: softmax(log p / temperature). The result is scaled
    by temperature squared, which keeps gradients at one scale (Hinton et al., arXiv 1503.02531). `reverse` is
    KL(student || teacher), as the paper draws it; `forward` the opposite; `jsd` the Jensen-Shannon divergence. Draws
    from the tail make `forward` an unbiased estimate of KL over the whole vocabulary (see `within_tail`).
    """
    if teacher.top_ids is None or not len(teacher.top_ids):
        return _nothing(student)
    assert teacher.top_log_probs is not None and teacher.tail_log_prob is not None
    ours, theirs = buckets(student.scores, teacher.top_log_probs, teacher.tail_log_prob, settings.temperature)
    per_position = DIVERGENCES[settings.direction](ours, theirs) * settings.temperature**2
    if teacher.draw_ids is not None and teacher.draw_log_probs is not None and settings.uses_draws():
        per_position = per_position + within_tail(ours, theirs, student.scores.draws, teacher.draw_log_probs)
    return per_position.sum(), count_of(len(ours), per_position)


@dataclass(frozen=True)
class Loss:
    """A loss function, its settings, the targets it reads, and the head it shares: a trained one, or the base's own.

    `only` says what it can train, if that is not both: a student or a twig.

    `count` returns what `compute` will count in a batch. The trainer needs it for all batches of an optimizer step
    before the first backward.
    """

    compute: Callable[[StudentOutputs, TeacherTargets, Head, Any], Result]
    settings: type[Section]
    count: Callable[[Any, Counts], Tensor]
    targets: tuple[str, ...] = ()
    head: Literal["head_mixer", "vision_map", "base_head"] | None = None
    only: Literal["student", "twig"] | None = None


LOSSES: dict[str, Loss] = {
    "supervised": Loss(supervised, SupervisedLoss, lambda _, counts: counts.answers.sum()),
    "attention": Loss(
        attention,
        AttentionLoss,
        lambda settings, counts: len(settings.layers) * counts.text_rows.sum(),
        targets=("attention",),
        head="head_mixer",
        only="student",
    ),
    "vision_all": Loss(
        vision_all,
        VisionAllLoss,
        lambda _, counts: counts.images.sum(),
        targets=("vision",),
        head="vision_map",
        only="student",
    ),
    "vision_focus": Loss(
        vision_focus,
        VisionFocusLoss,
        lambda _, counts: counts.attended_images.sum(),
        targets=("vision", "attention"),
        head="vision_map",
        only="student",
    ),
    "logits": Loss(logits, LogitsLoss, lambda _, counts: counts.answers.sum(), targets=("logits",)),
    "query_attention": Loss(
        query_attention,
        QueryAttentionLoss,
        lambda _, counts: counts.asks_about_images.sum(),
        targets=("query_attention",),
        only="twig",
    ),
    "prediction": Loss(
        prediction,
        PredictionLoss,
        lambda _, counts: counts.answers.sum(),
        targets=("final_hidden",),
        head="base_head",
        only="twig",
    ),
    "policy": Loss(policy, PolicyLoss, lambda _, counts: counts.asks_about_images.sum(), only="twig"),
}


def _nothing(student: StudentOutputs) -> Result:
    """Return a sum of zero and a count of zero; attached to the graph, so that backward still runs."""
    zero = student.scores.label.sum() * 0
    return zero, count_of(0, zero)
