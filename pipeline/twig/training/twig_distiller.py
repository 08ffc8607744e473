"""The twig with its losses as one module: from stored hidden states to loss terms, without the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.distill.model.loss_module import LossModule, Recompute
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES
from pipeline.positions import IGNORE_INDEX, Counts, find_slots, last_prompt_positions
from pipeline.targets.vocabulary import score_answers
from pipeline.twig.module import Twig
from pipeline.twig.scaffold import Scaffold
from pipeline.twig.training.base_head import BaseHead


class TwigDistiller(LossModule):
    """A twig and its losses.

    `scaffold` gives masks and rotary positions, `base_head` the base's logits of its last hidden states. They are no
    part of the module, so nothing of them is trained or saved.
    """

    def __init__(
        self,
        twig: Twig,
        losses: Mapping[str, Any],
        *,
        scaffold: Scaffold,
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
        base_head: BaseHead | None = None,
    ):
        super().__init__(losses, patch_feature_cache_bytes=patch_feature_cache_bytes, recompute=recompute)
        self.twig = twig
        self.heads = nn.ModuleDict()
        self.scaffold, self.base_head = scaffold, base_head

    def outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
        """Run the twig on the hidden states of a batch, with all of its vision tokens."""
        assert teacher.hidden_states is not None
        predicts = batch["labels"][:, 1:] != IGNORE_INDEX
        # The last position predicts nothing.
        answers = nn.functional.pad(predicts, (0, 1))
        hidden = teacher.hidden_states.to(self.scaffold.dtype)
        slots = find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"])
        rows = last_prompt_positions(batch["labels"], batch["attention_mask"])
        logits, vision_scores = self.twig(hidden, self.scaffold.inputs(batch), answers, rows, slots.vision)
        return StudentOutputs(
            scores=score_answers(logits, batch["labels"][:, 1:][predicts], teacher.top_ids, teacher.draw_ids),
            slots=slots,
            logits=logits,
            vision_scores=vision_scores,
            asks=Counts.of(batch).asks_about_images > 0,
        )

    def head_of(self, loss: str) -> nn.Module | None:
        """Return the base's own head for the loss that reads it; no other loss of a twig has a head."""
        return None if self.base_head is None or LOSSES[loss].head != "base_head" else self.base_head.module
