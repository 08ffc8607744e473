"""The Distiller: the student and its trained heads as one module, whose forward returns every loss term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distill.join.memory import TensorCache
from pipeline.errors import JoinError
from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.losses import LOSSES, StudentOutputs, TeacherTargets
from pipeline.models.merge import MergedInputs
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.tap import attention_of_layers, record_layer_inputs
from pipeline.positions import IGNORE_INDEX
from pipeline.shapes import expect_shape
from pipeline.targets.targets import TARGETS, TeacherFacts


@dataclass(frozen=True)
class Terms:
    """Loss term -> (float32 sum, count) of a batch, and the share of its samples that received every target."""

    terms: dict[str, tuple[Tensor, Tensor]]
    coverage: Tensor


# A batch and the tower's features of its images -> the batch with the targets that the store does not hold.
Recompute = Callable[[Mapping[str, Any], Tensor | None], Mapping[str, Any]]


class Distiller(nn.Module):
    """A student held to labels and teacher. Heads are parameters of this module, never of the student."""

    def __init__(
        self,
        student: MobileVLMForCausalLM,
        losses: Mapping[str, Any],
        *,
        facts: TeacherFacts,
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
    ):
        super().__init__()
        self.student = student
        self.losses = dict(losses)
        self.heads = build_heads(self.losses, student, facts)
        self.patch_feature_cache = TensorCache(patch_feature_cache_bytes)
        self.recompute = recompute  # no module: nothing of a teacher is trained or saved

    def forward(self, batch: Mapping[str, Any]) -> Terms:
        """One batch of `JoinCollator`. Raises `JoinError` if a sample did not receive a target it must have."""
        patch_features = self._patch_features(batch)
        batch = self.recompute(batch, patch_features) if self.recompute else batch
        outputs, coverage = self._student_outputs(batch, patch_features)
        teacher = TeacherTargets(**batch["targets"])
        for layer, attention in teacher.attention.items():
            rows, columns = outputs.slots.text.shape[1], outputs.slots.vision.shape[1]
            expect_shape(
                f"stored attention of layer {layer}", attention, "B H T J", {"T": rows, "J": columns}
            )
        terms = {}
        # Heads and losses are float32 under `train.bf16` too: they are small, and KL is a difference of like numbers.
        with torch.autocast(coverage.device.type, enabled=False):
            for name, settings in self.losses.items():
                row = LOSSES[name]
                head = self.heads[row.head] if row.head is not None and row.head in self.heads else None
                terms[name] = row.compute(outputs, teacher, head, settings)
        return Terms(terms, coverage)

    def _student_outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None
    ) -> tuple[StudentOutputs, Tensor]:
        vision = None if patch_features is None else self.student.encode_images(patch_features=patch_features)
        merged = self.student.merge_inputs(
            batch["input_ids"], vision, attention_mask=batch["attention_mask"], labels=batch["labels"]
        )
        coverage = self._check_coverage(batch, merged)
        with record_layer_inputs(self.student.model.layers, self._tapped_layers()) as inputs:
            hidden = self.student.model(
                inputs_embeds=merged.inputs_embeds,
                attention_mask=merged.attention_mask.long(),
                use_cache=False,
            ).last_hidden_state
        predicts = merged.labels[:, 1:] != IGNORE_INDEX
        outputs = StudentOutputs(
            # The head runs where labels are: an answer is a few positions of a sequence, a vocabulary is wide.
            answer_logits=self.student.lm_head(hidden[:, :-1][predicts]) + self._nothing(patch_features),
            answer_labels=merged.labels[:, 1:][predicts],
            slots=merged.slots,
            vision=vision,
            attention=attention_of_layers(self.student.model, inputs, merged),
        )
        return outputs, coverage

    def _nothing(self, patch_features: Tensor | None) -> Tensor | float:
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

    def _check_coverage(self, batch: Mapping[str, Any], merged: MergedInputs) -> Tensor:
        """Share of samples that brought as many rows of every target as their own tokens ask for."""
        num_vision_tokens = self.student.config.num_vision_tokens
        images = (merged.slots.vision >= 0).sum(dim=1) // num_vision_tokens
        text = (merged.slots.text >= 0).sum(dim=1)
        answers = (merged.labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
        covered = torch.ones_like(images, dtype=torch.bool)
        for target, received in batch["received"].items():
            expected = TARGETS[target].rows(images, text, answers)
            covered &= received == expected
            if not bool(covered.all()):
                at = int((~covered).nonzero()[0, 0])
                raise JoinError(
                    f"kd/coverage is {covered.float().mean():.3f}, must be 1: sample {at} of the batch needs "
                    f"{int(expected[at])} rows of the target {target!r} and received {int(received[at])}; "
                    "run `alignkd verify` on the store"
                )
        return covered.float().mean()


def build_heads(
    losses: Mapping[str, Any], student: MobileVLMForCausalLM, facts: TeacherFacts
) -> nn.ModuleDict:
    """The heads that the losses share, by kind: at most one vision map and one head mixer."""
    heads = nn.ModuleDict()
    if "vision_map" in {LOSSES[name].head for name in losses}:
        heads["vision_map"] = VisionMap(facts.hidden_size, student.config.hidden_size)
    attention = losses.get("attention")
    if attention is not None and attention.heads == "mix":
        heads["head_mixer"] = HeadMixer(
            len(attention.layers), facts.num_heads, student.config.num_attention_heads
        )
    return heads
