"""LOSSES: how a student is held to its labels and to its teacher. Every loss returns a float32 sum and a count.

The trainer adds sums and counts over a whole optimizer step and divides once, so a loss does not depend on how
the step is cut into batches. Each term is zero, with zero gradient, where the student equals the teacher; it
never sees padding, and it is 0 where a batch has nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.losses.divergences import DIVERGENCES, buckets, within_tail
from pipeline.positions import Slots, answers_in, attended_images_in, images_in, text_rows_in
from pipeline.settings import Section
from pipeline.targets.vocabulary import AnswerScores, score_answers

# Probabilities below this count as this; teacher and student alike, so that equal stays equal.
SMALLEST_PROBABILITY = 1e-8


@dataclass(frozen=True)
class TeacherTargets:
    """What the store holds for a batch, padded like the batch itself. Absent targets are None or empty.

    `attention`  layer -> float32 'B H T J', rows as in `Slots.text`, columns as in `Slots.vision` (H is 1 for a
                 head mean); `vision` float32 'I N D'; `top_ids` int64 'A K'; `top_log_probs` float32 'A K';
                 `tail_log_prob` float32 'A': log of the probability outside the top K; `draw_ids` int64 'A Z',
                 `draw_log_probs` float32 'A Z': tokens drawn from there, and their log probabilities.
    """

    attention: Mapping[int, Tensor] = field(default_factory=dict)
    vision: Tensor | None = None
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None
    tail_log_prob: Tensor | None = None
    draw_ids: Tensor | None = None
    draw_log_probs: Tensor | None = None


@dataclass(frozen=True)
class StudentOutputs:
    """What a student's forward leaves for the losses.

    `answer_logits` 'A V' and `answer_labels` int64 'A' at the positions that predict a label;
    `vision` 'I N D' projected vision features; `attention` layer -> float32 'B H T J'; `slots`.
    """

    answer_logits: Tensor
    answer_labels: Tensor
    slots: Slots
    vision: Tensor | None = None
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    _scored: dict[int, tuple[TeacherTargets, AnswerScores]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def scores(self, teacher: TeacherTargets) -> AnswerScores:
        """What losses read of the logits, for the tokens that this teacher names: made once, for all of them."""
        if id(teacher) not in self._scored:
            named = (teacher.top_ids, teacher.draw_ids)
            scores = score_answers(self.answer_logits, self.answer_labels, *named)
            self._scored[id(teacher)] = (teacher, scores)  # held, so that its id stays its own
        return self._scored[id(teacher)][1]


Result = tuple[Tensor, Tensor]
Head = nn.Module | None
Weight = Annotated[float, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]


class SupervisedLoss(Section):
    """Cross entropy with the labels."""

    weight: Weight = 1.0


def supervised(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """Cross entropy with the labels; counts answer positions 'A'."""
    total = -student.scores(teacher).label.sum()
    return total, _count(student.answer_labels.numel(), total)


class AttentionLoss(Section):
    """Text-to-vision attention of (teacher layer, student layer) pairs."""

    weight: Weight = 1.0
    distance: Literal["kl", "mse"] = "kl"
    heads: Literal["mean", "mix"] = "mean"
    layers: list[tuple[Layer, Layer]] = Field(default=[(0, 0)], min_length=1)

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
        total = total + (per_row.mean(dim=1) * real_rows).sum()
        count += int(real_rows.sum())
    return total, _count(count, total)


def row_kl(teacher: Tensor, student: Tensor, real: Tensor | Literal[True] = True) -> Tensor:
    """Return KL(teacher || student) of rows over J columns and a bucket for all else, in nats: '... T J' -> '... T'.

    `real` is False in padded columns.
    """
    teacher, student = (
        torch.cat([p * real, 1 - (p * real).sum(dim=-1, keepdim=True)], dim=-1).clamp(
            min=SMALLEST_PROBABILITY
        )
        for p in (teacher, student)
    )
    return (teacher * (teacher.log() - student.log())).sum(dim=-1)


def _row_mse(teacher: Tensor, student: Tensor, real: Tensor) -> Tensor:
    """Mean square over a row's real columns: 'B H T J' -> 'B H T'."""
    return ((teacher - student).square() * real).sum(dim=-1) / real.sum(dim=-1).clamp(min=1)


class VisionAllLoss(Section):
    """Mean square over all vision tokens, against a trained linear map of the teacher's."""

    weight: Weight = 1.0


def vision_all(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """All projected vision features against a trained linear map of the teacher's (L_V-all); counts images."""
    if teacher.vision is None or not len(teacher.vision):
        return _nothing(student)
    assert head is not None and student.vision is not None
    per_token = _vision_distance(student.vision, head(teacher.vision))
    return per_token.mean(dim=1).sum(), _count(len(teacher.vision), per_token)


class VisionFocusLoss(Section):
    """Mean square over the `k` vision tokens of an image that the teacher's text attends most, in `layer`."""

    weight: Weight = 1.0
    k: int = Field(default=16, ge=1)
    layer: Layer = 0

    def teacher_layers(self) -> list[int]:
        return [self.layer]


def vision_focus(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """The same over the k vision tokens of each image that the text attends most (L_V-focus).

    A token's score is the teacher's attention to it: mean over heads, sum over the T text rows. Counts images
    that text follows; one at the very end of a sample is attended by none, and has no focus.
    """
    if teacher.vision is None or not len(teacher.vision):
        return _nothing(student)
    assert head is not None and student.vision is not None
    per_token = _vision_distance(student.vision, head(teacher.vision))
    num_vision_tokens = per_token.shape[1]
    focus = focus_tokens(teacher.attention[settings.layer], student.slots, num_vision_tokens, settings.k)
    attended = _attended_images(student.slots, num_vision_tokens)
    total = (per_token.gather(1, focus).mean(dim=1) * attended).sum()
    return total, _count(int(attended.sum()), per_token)


def focus_tokens(attention: Tensor, slots: Slots, num_vision_tokens: int, k: int) -> Tensor:
    """The k most attended vision tokens of every image: 'B H T J' -> int64 'I k', images in batch order."""
    real_rows = slots.text >= 0
    mass = (attention.float().mean(dim=1) * real_rows[:, :, None]).sum(dim=1)
    per_image = mass[slots.vision >= 0].view(-1, num_vision_tokens)
    return per_image.topk(min(k, num_vision_tokens), dim=1).indices


def _attended_images(slots: Slots, num_vision_tokens: int) -> Tensor:
    """Whether any text follows an image, for every image of the batch in order: bool 'I'."""
    no_text = slots.text.new_full((len(slots.text), 1), -1)
    last_text = torch.cat([slots.text, no_text], dim=1).amax(dim=1, keepdim=True)
    return (slots.vision < last_text)[slots.vision >= 0].view(-1, num_vision_tokens)[:, 0]


def _vision_distance(student: Tensor, target: Tensor) -> Tensor:
    """Mean square over D of every vision token: 'I N D' -> 'I N'."""
    return (student.float() - target.float()).square().mean(dim=-1)


class LogitsLoss(Section):
    """KL on the answer's next-token distribution. At weight 1 it cost 7 points where it was measured.

    `tail: draws` uses the tokens that the store drew outside the top K, if it did and they estimate what is asked:
    `forward` at temperature 1. All else, and `bucket` always, takes what is outside as one token.
    """

    weight: Weight = 0.1
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    temperature: float = Field(default=1.0, gt=0)
    tail: Literal["draws", "bucket"] = Field(default="draws", exclude_if=lambda tail: tail == "draws")

    def uses_draws(self) -> bool:
        return self.tail == "draws" and self.direction == "forward" and self.temperature == 1


def logits(student: StudentOutputs, teacher: TeacherTargets, head: Head, settings: Any) -> Result:
    """KL on the answer's next-token distribution over the teacher's top K and a tail bucket; counts positions.

    Both sides become the same K + 1 buckets, tempered as buckets: softmax(log p / temperature), and scaled by
    temperature squared. `reverse` is KL(student || teacher), as the paper draws it; `forward` the opposite;
    `jsd` the Jensen-Shannon divergence. Draws from the tail make `forward` an unbiased estimate of KL over the whole
    vocabulary (see `within_tail`).
    """
    if teacher.top_ids is None or not len(teacher.top_ids):
        return _nothing(student)
    assert teacher.top_log_probs is not None and teacher.tail_log_prob is not None
    scores = student.scores(teacher)
    ours, theirs = buckets(scores, teacher.top_log_probs, teacher.tail_log_prob, settings.temperature)
    per_position = DIVERGENCES[settings.direction](ours, theirs) * settings.temperature**2
    if teacher.draw_ids is not None and teacher.draw_log_probs is not None and settings.uses_draws():
        per_position = per_position + within_tail(ours, theirs, scores.draws, teacher.draw_log_probs)
    return per_position.sum(), _count(len(ours), per_position)


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES: the function, its settings, the targets it reads, the kind of trained head it shares.

    `count` is what `compute` will count in a batch, from ids and labels alone: the trainer needs it for all
    batches of an optimizer step before the first backward.
    """

    compute: Callable[[StudentOutputs, TeacherTargets, Head, Any], Result]
    settings: type[Section]
    count: Callable[[Any, Mapping[str, Tensor]], int]
    targets: tuple[str, ...] = ()
    head: Literal["head_mixer", "vision_map"] | None = None


LOSSES: dict[str, Loss] = {
    "supervised": Loss(supervised, SupervisedLoss, count=lambda settings, batch: answers_in(batch)),
    "attention": Loss(
        attention,
        AttentionLoss,
        count=lambda settings, batch: len(settings.layers) * text_rows_in(batch),
        targets=("attention",),
        head="head_mixer",
    ),
    "vision_all": Loss(
        vision_all,
        VisionAllLoss,
        count=lambda settings, batch: images_in(batch),
        targets=("vision",),
        head="vision_map",
    ),
    "vision_focus": Loss(
        vision_focus,
        VisionFocusLoss,
        count=lambda settings, batch: attended_images_in(batch),
        targets=("vision", "attention"),
        head="vision_map",
    ),
    "logits": Loss(logits, LogitsLoss, count=lambda settings, batch: answers_in(batch), targets=("logits",)),
}


def _count(count: int, like: Tensor) -> Tensor:
    return torch.tensor(count, dtype=torch.float32, device=like.device)


def _nothing(student: StudentOutputs) -> Result:
    """Zero of zero: a batch of text alone has no vision term. Attached to the graph, so backward still runs."""
    return student.answer_logits.float().sum() * 0, _count(0, student.answer_logits)
