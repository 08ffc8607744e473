"""The trained heads between teacher and student: kept in checkpoints, dropped from the exported student."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadMixer(nn.Module):
    """Trained convex mixtures of teacher heads, one for each student head. A convex mixture stays a distribution."""

    def __init__(self, num_pairs: int, num_teacher_heads: int, num_student_heads: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_pairs, num_student_heads, num_teacher_heads))

    def forward(self, attention: Tensor, pair: int) -> Tensor:
        """'B H T J' of the teacher's heads -> 'B H T J' of the student's, for one pair of layers.

        A batch without images may come with one head of no rows.
        """
        if not attention.numel():
            attention = attention.expand(-1, self.scores.shape[2], -1, -1)
        return torch.einsum("sh,bhtj->bstj", self.scores[pair].softmax(dim=-1), attention)

    def nothing(self) -> tuple[Tensor, int]:
        """Arguments of a forward over no rows: every parameter is in its graph, with a gradient of zero."""
        return torch.zeros(1, self.scores.shape[2], 0, 0, device=self.scores.device), 0


class VisionMap(nn.Linear):
    """A trained linear map of the teacher's vision features to the student's width; at equal widths it starts as the
    identity."""

    def __init__(self, teacher_width: int, student_width: int):
        super().__init__(teacher_width, student_width)
        if teacher_width == student_width:
            nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def nothing(self) -> tuple[Tensor]:
        """Arguments of a forward over no rows: every parameter is in its graph, with a gradient of zero."""
        return (torch.zeros(0, self.in_features, device=self.weight.device),)
