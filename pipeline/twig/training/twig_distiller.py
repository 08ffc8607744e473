"""The twig with its losses as one module: from stored hidden states to loss terms, without the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.distill.model.loss_module import LossModule, Recompute, Terms
from pipeline.losses.inputs import StudentOutputs, TeacherTargets, count_of
from pipeline.losses.losses import LOSSES
from pipeline.positions import IGNORE_INDEX, find_slots, last_prompt_positions
from pipeline.targets.vocabulary import score_answers
from pipeline.twig.module import Twig
from pipeline.twig.reinforcing.exploring import Exploring
from pipeline.twig.scaffold import Scaffold
from pipeline.twig.training.base_head import BaseHead

OBSERVED = ("policy/reward", "policy/entropy", "policy/overlap")


class TwigDistiller(LossModule):
    """A twig and its losses.

    `scaffold` gives masks and rotary positions, `base_head` the base's logits of its last hidden states, and
    `exploring` choices of vision tokens with their rewards. They are no part of the module, so nothing of them is
    trained or saved.
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
        exploring: Exploring | None = None,
    ):
        super().__init__(losses, patch_feature_cache_bytes=patch_feature_cache_bytes, recompute=recompute)
        self.twig = twig
        self.heads = nn.ModuleDict()
        self.scaffold, self.base_head, self.exploring = scaffold, base_head, exploring
        self.observed = () if exploring is None else OBSERVED

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
        seen = (slots.vision >= 0) & (slots.vision <= rows[:, None])
        inputs = self.scaffold.inputs(batch)
        logits, vision_scores = self.twig(hidden, inputs, answers, rows, slots.vision)
        actions = None
        if self.exploring is not None:
            assert vision_scores is not None
            actions = self.exploring.actions(
                vision_scores,
                slots.vision,
                hidden,
                inputs,
                batch,
                seen=seen,
                draws=self.training,
                progress=self.progress,
            )
        return StudentOutputs(
            scores=score_answers(logits, batch["labels"][:, 1:][predicts], teacher.top_ids, teacher.draw_ids),
            slots=slots,
            logits=logits,
            vision_scores=vision_scores,
            asks=seen.any(dim=1),
            actions=actions,
        )

    def observations(self, mine: StudentOutputs) -> Terms:
        """Return the mean reward of the choices, the entropy of the scores, and how alike the choices are."""
        if mine.actions is None or mine.asks is None:
            return {}
        values = (mine.actions.rewards.mean(dim=1), mine.actions.entropy, mine.actions.overlap)
        count = count_of(int(mine.asks.sum()), mine.actions.entropy)
        return {
            name: ((one * mine.asks).sum(), count) for name, one in zip(self.observed, values, strict=True)
        }

    def head_of(self, loss: str) -> nn.Module | None:
        """Return the base's own head for the loss that reads it; no other loss of a twig has a head."""
        return None if self.base_head is None or LOSSES[loss].head != "base_head" else self.base_head.module
