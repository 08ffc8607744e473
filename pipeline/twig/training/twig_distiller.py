"""The twig with its losses as one module: from stored hidden states to loss terms, without the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.distill.model.loss_module import LossModule, Recompute
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.positions import IGNORE_INDEX, find_slots
from pipeline.targets.vocabulary import score_answers
from pipeline.twig.module import Twig
from pipeline.twig.scaffold import Scaffold


class TwigDistiller(LossModule):
    """A twig and its losses.

    `scaffold` gives masks and rotary positions; it is no part of the module, so nothing of it is trained or saved.
    """

    def __init__(
        self,
        twig: Twig,
        losses: Mapping[str, Any],
        *,
        scaffold: Scaffold,
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
    ):
        super().__init__(losses, patch_feature_cache_bytes=patch_feature_cache_bytes, recompute=recompute)
        self.twig = twig
        self.heads = nn.ModuleDict()
        self.scaffold = scaffold

    def outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
        """Run the twig on the hidden states of a batch, with all of its vision tokens."""
        assert teacher.hidden_states is not None
        predicts = batch["labels"][:, 1:] != IGNORE_INDEX
        # The last position predicts nothing.
        answers = nn.functional.pad(predicts, (0, 1))
        hidden = teacher.hidden_states.to(self.scaffold.dtype)
        logits = self.twig(hidden, self.scaffold.inputs(batch), answers)
        return StudentOutputs(
            scores=score_answers(logits, batch["labels"][:, 1:][predicts], teacher.top_ids, teacher.draw_ids),
            slots=find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"]),
        )
