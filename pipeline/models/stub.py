"""The teacher in memory: the whole model where the targets keep logits, else a stub with a few percent of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig

from pipeline.errors import ConfigError, building
from pipeline.models.merge import MergedInputs, merge_vision_tokens
from pipeline.models.mobilevlm import TOWER_PREFIX, MobileVLMForCausalLM
from pipeline.models.tap import attention_of_layers, record_layer_inputs
from pipeline.models.teacher_plan import TeacherPlan, empty_model
from pipeline.positions import IGNORE_INDEX
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.target import TeacherForward


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. It runs without gradients but not in inference mode: its results meet trained tensors."""

    model: MobileVLMForCausalLM
    plan: TeacherPlan
    device: torch.device

    @property
    def attention_layers(self) -> Sequence[int]:
        attention = self.plan.targets.get("attention")
        return attention.layers if isinstance(attention, AttentionTarget) else ()

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projected vision features: 'I C Y X' -> 'I N D'."""
        return self.model.encode_images(self._on_device(pixel_values))

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> TeacherForward:
        """Run one batch: ids, mask and labels 'B S', vision tokens 'I N D' of its images in order."""
        merged = self._merge(
            self._on_device(input_ids),
            None if vision is None else self._on_device(vision),
            attention_mask=self._on_device(attention_mask),
            labels=self._on_device(labels),
        )
        inputs, hidden = self._run(merged)
        predicts = merged.labels[:, 1:] != IGNORE_INDEX
        return TeacherForward(
            slots=merged.slots,
            attention=attention_of_layers(self.model.model, inputs, merged),
            answer_logits=None if hidden is None else self.model.lm_head(hidden[:, :-1][predicts]),
            num_answers=predicts.sum(dim=1).tolist(),
            num_vision_tokens=self.plan.facts.num_vision_tokens,
        )

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            # Only from pinned memory is the copy asynchronous.
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _merge(
        self, input_ids: torch.Tensor, vision: torch.Tensor | None, **masks: torch.Tensor
    ) -> MergedInputs:
        if self.plan.deepest != -1:
            return self.model.merge_inputs(input_ids, vision, **masks)
        # No decoder layer is needed, so the embeddings were not loaded. Only positions are computed.
        text_embeds = torch.zeros(*input_ids.shape, self.plan.facts.hidden_size, device=self.device)
        return merge_vision_tokens(
            input_ids, text_embeds, vision, **masks, num_vision_tokens=self.plan.facts.num_vision_tokens
        )

    def _run(self, merged: MergedInputs) -> tuple[Mapping[int, torch.Tensor], torch.Tensor | None]:
        """Return the inputs 'B S D' of the attention layers and, of a whole model, the last hidden states 'B S D'."""
        if self.plan.deepest == -1:
            return {}, None
        hidden = None
        layers = self.model.model.layers
        with record_layer_inputs(layers, self.attention_layers, stop_at=self.plan.deepest) as inputs:
            hidden = self.model.model(
                inputs_embeds=merged.inputs_embeds,
                attention_mask=merged.attention_mask.long(),
                use_cache=False,
            ).last_hidden_state
        return inputs, hidden


def load_teacher(plan: TeacherPlan, *, dtype: torch.dtype, device: torch.device) -> Teacher:
    """Load the planned tensors, and no others, in evaluation mode.

    Raises `ConfigError` if a tensor's shape is not that of the config, or if the device cannot hold it.
    """
    model = empty_model(plan.config)
    expected = model.state_dict()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in plan.checkpoint.tensors(plan.tensors):
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"{plan.checkpoint.folder}: tensor {name!r} has shape {tuple(tensor.shape)}, its config.json "
                f"asks for {tuple(expected[name].shape)}; use the config.json that belongs to the checkpoint"
            )
        with building(f"teacher {plan.checkpoint.folder} on {device}", then="choose another teacher.device"):
            weights[name] = tensor.to(dtype=dtype, device=device)
    # All other tensors stay on the meta device, where any use of them raises: a mistake in the plan cannot go unseen.
    model.load_state_dict(weights, strict=False, assign=True)
    _compute_buffers(model, device)
    if not plan.is_stub:
        model.tie_weights()
    return Teacher(model.eval().requires_grad_(False), plan, device)


def _compute_buffers(model: MobileVLMForCausalLM, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds: rotary frequencies, and positions of the CLIP tower."""
    if isinstance(model.config.tower, CLIPVisionConfig):
        embeddings: Any = model.get_submodule(f"{TOWER_PREFIX}vision_tower.vision_model.embeddings")
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
