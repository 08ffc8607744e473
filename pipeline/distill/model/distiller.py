"""The student and its trained heads as one module, whose forward returns every loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distill.join.memory import TensorCache
from pipeline.errors import JoinError
from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.tap import attention_of_layers, record_layer_inputs
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

    `facts` are those of the teacher that each target comes from, by target.
    """

    def __init__(
        self,
        student: MobileVLMForCausalLM,
        losses: Mapping[str, Any],
        *,
        facts: Mapping[str, TeacherFacts],
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
    ):
        super().__init__()
        self.student = student
        self.losses = dict(losses)
        self.heads = build_heads(self.losses, student, facts)
        self.patch_feature_cache = TensorCache(patch_feature_cache_bytes)
        self.recompute = recompute  # no module, so nothing of a teacher is trained or saved

    def forward(self, batch: Mapping[str, Any]) -> Terms:
        """Return every loss term of a batch of `JoinCollator`. Raises `JoinError` if rows of a target are missing."""
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

    def _head_of(self, loss: str) -> nn.Module | None:
        kind = LOSSES[loss].head
        return self.heads[kind] if kind is not None and kind in self.heads else None

    def _student_outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
        vision = None if patch_features is None else self.student.encode_images(patch_features=patch_features)
        merged = self.student.merge_inputs(
            batch["input_ids"], vision, attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
        with record_layer_inputs(self.student.model.layers, self._tapped_layers()) as inputs:
            hidden = self.student.model(
                inputs_embeds=merged.inputs_embeds,
                attention_mask=merged.attention_mask.long(),
                use_cache=False,
            ).last_hidden_state
        predicts = merged.labels[:, 1:] != IGNORE_INDEX
        # The head runs where labels are: an answer is a few positions of a sequence, and a vocabulary is wide.
        logits = self.student.lm_head(hidden[:, :-1][predicts]) + self._zero_of_unused(patch_features)
        labels = merged.labels[:, 1:][predicts]
        return StudentOutputs(
            # One pass over the vocabulary for all losses: a pass costs one exponential a logit in each direction.
            scores=score_answers(logits, labels, teacher.top_ids, teacher.draw_ids),
            slots=merged.slots,
            vision=vision,
            attention=attention_of_layers(self.student.model, inputs, merged),
        )

    def _zero_of_unused(self, patch_features: Tensor | None) -> Tensor | float:
        """Zero that puts heads, and the projector, into the graph of a batch that has no image for them.

        Processes add up their gradients parameter by parameter, and the batch of another may have images: a parameter
        without a gradient in one of them would leave the others waiting, or pair the wrong tensors (FSDP2).
        """
        if not (dist.is_available() and dist.is_initialized()):
            return 0.0
        heads: Any = self.heads.values()
        zero = sum(0.0 * head(*head.nothing()).sum() for head in heads)
        if patch_features is not None:
            return zero
        config = self.student.config
        blank = torch.zeros(
            1, config.num_vision_tokens, config.vision_config.hidden_size, device=self.student.device
        )
        return zero + 0.0 * self.student.encode_images(patch_features=blank).sum()

    def of_images(self) -> list[nn.Parameter]:
        """The trained parameters that a batch without an image gives no gradient in one process."""
        modules = [self.student.model.mm_projector]
        modules += [head for head in self.heads.values() if isinstance(head, VisionMap)]
        return [parameter for module in modules for parameter in module.parameters()]

    def _tapped_layers(self) -> list[int]:
        attention = self.losses.get("attention")
        return sorted({student_layer for _, student_layer in attention.layers}) if attention else []

    def _patch_features(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The frozen tower's features 'I M W' of the batch's images, from memory where they are held."""
        if batch["pixel_values"] is None:
            return None
        return self.patch_feature_cache.of_images(batch, self.student.encode_patches)


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
    losses: Mapping[str, Any], student: MobileVLMForCausalLM, facts: Mapping[str, TeacherFacts]
) -> nn.ModuleDict:
    """Return the heads that the losses share, by kind: at most one vision map and one head mixer."""
    heads = nn.ModuleDict()
    if "vision_map" in {LOSSES[name].head for name in losses}:
        heads["vision_map"] = VisionMap(facts["vision"].hidden_size, student.config.hidden_size)
    attention = losses.get("attention")
    if attention is not None and attention.heads == "mix":
        heads["head_mixer"] = HeadMixer(
            len(attention.layers), facts["attention"].num_heads, student.config.num_attention_heads
        )
    return heads
