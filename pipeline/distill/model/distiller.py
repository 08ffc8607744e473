"""The student and its trained heads as one module, whose forward returns every loss term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distill.model.loss_module import LossModule, Recompute
from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.targets.target import TeacherFacts
from pipeline.targets.vocabulary import score_answers


class Distiller(LossModule):
    """A student and its losses. The trained heads are parameters of this module, never of the student.

    `student` is the network of a `VisionLanguageModel`. `facts` are those of the teacher that each target comes from,
    by target.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Mapping[str, Any],
        *,
        facts: Mapping[str, TeacherFacts],
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
    ):
        super().__init__(losses, patch_feature_cache_bytes=patch_feature_cache_bytes, recompute=recompute)
        self.student: Any = student
        self.vlm = VisionLanguageModel(student)
        self.heads = build_heads(self.losses, self.vlm, facts)

    def outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
        """Run the student on a batch."""
        sizes = [size for of_sample in batch["sizes"] for size in of_sample]
        features = self.vlm.encode(batch["images"], sizes, patch_features=patch_features) if sizes else None
        predicts = batch["labels"][:, 1:] != IGNORE_INDEX
        # The last position predicts nothing.
        answers = nn.functional.pad(predicts, (0, 1))
        made = self.vlm.forward(batch, features, layers=self._tapped_layers(), answers=answers)
        assert made.logits is not None
        return StudentOutputs(
            # One pass over the vocabulary for all losses: a pass costs one exponential a logit in each direction.
            scores=score_answers(
                made.logits + self._zero_of_unused(features is not None),
                batch["labels"][:, 1:][predicts],
                teacher.top_ids,
                teacher.draw_ids,
            ),
            slots=made.slots,
            vision=None if features is None else features.flat,
            attention=made.attention,
        )

    def _zero_of_unused(self, has_images: bool) -> Tensor | float:
        """Zero that puts heads, and the projector, into the graph of a batch that has no image for them.

        Processes add up their gradients parameter by parameter, and the batch of another may have images: a parameter
        without a gradient in one of them would leave the others waiting, or pair the wrong tensors (FSDP2).
        """
        if not (dist.is_available() and dist.is_initialized()):
            return 0.0
        heads: Any = self.heads.values()
        zero = sum(0.0 * head(*head.nothing()).sum() for head in heads)
        if has_images:
            return zero
        return zero + sum(0.0 * parameter.sum() for parameter in self._connector())

    def _connector(self) -> list[nn.Parameter]:
        """The projector's trained parameters."""
        names = self.vlm.connector_names
        return [p for name, p in self.student.named_parameters() if name in names and p.requires_grad]

    def of_images(self) -> list[nn.Parameter]:
        """Return the trained parameters that a batch without an image gives no gradient in one process."""
        maps = [head for head in self.heads.values() if isinstance(head, VisionMap)]
        return [*self._connector(), *(parameter for head in maps for parameter in head.parameters())]

    def _tapped_layers(self) -> list[int]:
        attention = self.losses.get("attention")
        return sorted({student_layer for _, student_layer in attention.layers}) if attention else []

    def patch_features(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the frozen tower's features 'I M W' of the batch's images, from memory where they are held.

        None where the family's tower and projector are one step.
        """
        if not batch["images"] or not self.vlm.splits_tower:
            return None
        return self.patch_feature_cache.of_images(batch, self.vlm.patch_features)


def build_heads(
    losses: Mapping[str, Any], student: VisionLanguageModel, facts: Mapping[str, TeacherFacts]
) -> nn.ModuleDict:
    """Return the heads that the losses share, by kind: at most one vision map and one head mixer."""
    heads = nn.ModuleDict()
    if "vision_map" in {LOSSES[name].head for name in losses}:
        heads["vision_map"] = VisionMap(facts["vision"].hidden_size, student.text_config.hidden_size)
    attention = losses.get("attention")
    if attention is not None and attention.heads == "mix":
        heads["head_mixer"] = HeadMixer(
            len(attention.layers), facts["attention"].num_heads, student.text_config.num_attention_heads
        )
    return heads
