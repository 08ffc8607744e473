"""The student and its trained heads as one module, whose forward returns every loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distill.join.dataset import Refused
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import JoinError
from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX, Counts
from pipeline.shapes import expect_shape
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS
from pipeline.targets.vocabulary import score_answers

# Loss -> its sum, float32, and its count in a batch.
Terms = dict[str, tuple[Tensor, Tensor]]

# A batch and the tower's features of its images -> the batch with the targets that no store gave.
Recompute = Callable[[Mapping[str, Any], Tensor | None], Mapping[str, Any]]


class Distiller(nn.Module):
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
        super().__init__()
        self.student: Any = student
        self.vlm = VisionLanguageModel(student)
        self.losses = dict(losses)
        self.heads = build_heads(self.losses, self.vlm, facts)
        self.patch_feature_cache = TensorCache(patch_feature_cache_bytes)
        self.recompute = recompute  # no module, so nothing of a teacher is trained or saved

    def forward(self, batch: Mapping[str, Any]) -> Terms:
        """Return every loss term of a batch of `JoinCollator`. Raises `JoinError` if rows of a target are missing."""
        Refused.check(batch)
        patch_features = self._patch_features(batch)
        if self.recompute:
            batch = self.recompute(batch, patch_features)
        check_num_rows(batch)
        teacher = TeacherTargets(**batch["targets"])
        student = self._student_outputs(batch, patch_features, teacher)
        shape = {"T": student.slots.text.shape[1], "J": student.slots.vision.shape[1]}
        for layer, attention in teacher.attention.items():
            expect_shape(f"stored attention of layer {layer}", attention, "B H T J", shape)
        # Heads and losses are float32 under `train.bf16` too: they are small, and KL is a difference of like numbers.
        with torch.autocast(student.slots.text.device.type, enabled=False):
            return {
                name: LOSSES[name].compute(student, teacher, self._head_of(name), settings)
                for name, settings in self.losses.items()
            }

    def total(self, terms: Terms) -> Tensor:
        """Return the loss of one batch, a float32 scalar: the weighted sum of each term's mean."""
        means = {name: total / count.clamp(min=1) for name, (total, count) in terms.items()}
        return torch.stack([self.losses[name].weight * mean for name, mean in means.items()]).sum()

    def _head_of(self, loss: str) -> nn.Module | None:
        kind = LOSSES[loss].head
        return self.heads[kind] if kind is not None and kind in self.heads else None

    def _student_outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
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
        """The trained parameters that a batch without an image gives no gradient in one process."""
        maps = [head for head in self.heads.values() if isinstance(head, VisionMap)]
        return [*self._connector(), *(parameter for head in maps for parameter in head.parameters())]

    def _tapped_layers(self) -> list[int]:
        attention = self.losses.get("attention")
        return sorted({student_layer for _, student_layer in attention.layers}) if attention else []

    def _patch_features(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The frozen tower's features 'I M W' of the batch's images, from memory where they are held.

        None where the family's tower and projector are one step.
        """
        if not batch["images"] or not self.vlm.splits_tower:
            return None
        return self.patch_feature_cache.of_images(batch, self.vlm.patch_features)


def check_num_rows(batch: Mapping[str, Any]) -> None:
    """Raise `JoinError` unless every sample has as many rows of every target as its own tokens ask for."""
    counts = Counts.of(batch)
    for name, found in batch["received"].items():
        expected = TARGETS[name].num_rows(counts)
        if bool((wrong := found != expected).any()):
            at = int(wrong.nonzero()[0, 0])
            raise JoinError(
                f"sample {at} of the batch needs {int(expected[at])} rows of the target {name!r} and received "
                f"{int(found[at])}; run `alignkd verify` on the store"
            )


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
