"""A student's outputs before their answers are scored for the tokens that a teacher's targets name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pipeline.losses.inputs import Actions, StudentOutputs, TeacherTargets
from pipeline.positions import Slots
from pipeline.targets.vocabulary import score_answers

NO_SLOTS = Slots(text=torch.zeros(0, 0).long(), vision=torch.zeros(0, 0).long())


@dataclass(frozen=True)
class Unscored:
    answer_logits: torch.Tensor
    answer_labels: torch.Tensor
    slots: Slots = NO_SLOTS
    vision: torch.Tensor | None = None
    attention: Mapping[int, torch.Tensor] = field(default_factory=dict)
    vision_scores: torch.Tensor | None = None
    asks: torch.Tensor | None = None
    actions: Actions | None = None

    def scored(self, teacher: TeacherTargets) -> StudentOutputs:
        scores = score_answers(self.answer_logits, self.answer_labels, teacher.top_ids, teacher.draw_ids)
        return StudentOutputs(
            scores,
            self.slots,
            self.vision,
            self.attention,
            logits=self.answer_logits,
            vision_scores=self.vision_scores,
            asks=self.asks,
            actions=self.actions,
        )
