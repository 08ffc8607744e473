"""The teacher, cut to what the targets need: whole for logits, else a stub that loads a few percent of it.

Attention of layer n needs the embeddings, layers 0 to n-1, and norm, q and k of layer n; projected vision
features need the tower up to the selected layer and the projector. Nothing else of a stub is ever read from disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig

from pipeline.errors import ConfigError, building
from pipeline.models.checkpoint import Checkpoint, digest_of_tensors
from pipeline.models.configuration import ITS_CONFIG, read_config
from pipeline.models.merge import MergedInputs, merge_vision_tokens
from pipeline.models.mobilevlm import TOWER_PREFIX, MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.tap import attention_of_layers, record_layer_inputs
from pipeline.positions import IGNORE_INDEX
from pipeline.targets.targets import TeacherFacts, TeacherForward, deepest_layer

TAPPED = ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight")
TOWER_LAYER = re.compile(r"model\.vision_tower\..*\.encoder\.layers\.(\d+)\.")
DECODER_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class TeacherPlan:
    """Which tensors of a checkpoint the targets need, before any is loaded.

    `deepest` is the deepest decoder layer read (-1: none; None: the whole model). `digest` is of exactly these
    tensors as the checkpoint holds them: a stub and the whole model of one checkpoint have different digests,
    a `.bin` and a safetensors copy the same. `digests` are of groups of tensors, which a smaller stub of the same
    checkpoint shares: `vision`, `embeddings`, `layer 0 attention`, `layer 0`, ..., `head`.
    """

    checkpoint: Checkpoint
    config: MobileVLMConfig
    facts: TeacherFacts
    targets: Mapping[str, Any]
    deepest: int | None
    tensors: tuple[str, ...]
    digest: str
    digests: Mapping[str, str]

    @property
    def is_stub(self) -> bool:
        return self.deepest is not None


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher, whole or stub. No inference mode: what it computes may stand beside what is trained."""

    model: MobileVLMForCausalLM
    plan: TeacherPlan

    @property
    def device(self) -> torch.device:
        """Where it runs: the projector is in every stub, the first parameter may be on the meta device."""
        return self.model.get_parameter("model.mm_projector.mlp.mlp.0.weight").device

    @property
    def attention_layers(self) -> Sequence[int]:
        attention = self.plan.targets.get("attention")
        return attention.layers if attention else ()

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected vision features: 'I C Y X' -> 'I N D'."""
        return self.model.encode_images(self._moved(pixel_values))

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        vision: torch.Tensor | None,
    ) -> TeacherForward:
        """One batch: ids, mask and labels 'B S', vision tokens 'I N D' of its images in order."""
        merged = self._merge(
            self._moved(input_ids),
            None if vision is None else self._moved(vision),
            attention_mask=self._moved(attention_mask),
            labels=self._moved(labels),
        )
        with record_layer_inputs(self.model.model.layers, self._hooked_layers()) as inputs:
            last = self._run(merged)
        if self.plan.is_stub and self.attention_layers:
            inputs[self.attention_layers[-1]] = last
        return self._forward_results(merged, inputs, last)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the teacher's device; to a GPU from pinned memory, so that nobody waits for the copy."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _merge(
        self, input_ids: torch.Tensor, vision: torch.Tensor | None, **masks: torch.Tensor
    ) -> MergedInputs:
        if self.plan.deepest != -1:
            return self.model.merge_inputs(input_ids, vision, **masks)
        # No layer is asked for, so the embeddings were not loaded: positions are all that is left to find.
        text_embeds = torch.zeros(*input_ids.shape, self.plan.facts.hidden_size, device=self.device)
        return merge_vision_tokens(
            input_ids, text_embeds, vision, **masks, num_vision_tokens=self.plan.facts.num_vision_tokens
        )

    def _hooked_layers(self) -> list[int]:
        """Layers whose input a hook records; a stub's deepest layer never runs, its input is the output."""
        return [layer for layer in self.attention_layers if layer < self.model.config.num_hidden_layers]

    def _run(self, merged: MergedInputs) -> torch.Tensor:
        """Hidden states 'B S D' after the layers that are there (a stub has no final norm)."""
        return self.model.model(
            inputs_embeds=merged.inputs_embeds, attention_mask=merged.attention_mask.long(), use_cache=False
        ).last_hidden_state

    def _forward_results(
        self, merged, inputs: Mapping[int, torch.Tensor], last: torch.Tensor
    ) -> TeacherForward:
        predicts = merged.labels[:, 1:] != IGNORE_INDEX
        answer_logits = None if self.plan.is_stub else self.model.lm_head(last[:, :-1][predicts])
        return TeacherForward(
            slots=merged.slots,
            attention=attention_of_layers(self.model.model, inputs, merged),
            answer_logits=answer_logits,
            num_answers=predicts.sum(dim=1).tolist(),
            num_vision_tokens=self.plan.facts.num_vision_tokens,
        )


def teacher_facts(name: str, config: MobileVLMConfig) -> TeacherFacts:
    """What stage 2 needs to know, from the teacher's config."""
    return TeacherFacts(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        num_vision_tokens=config.num_vision_tokens,
        vocab_size=config.vocab_size,
    )


def plan_teacher(
    name: str, *, targets: Mapping[str, Any], vouching_for: Mapping[str, Any] | None = None
) -> TeacherPlan:
    """Find and hash the tensors that the targets need, in a checkpoint folder or hub id.

    `digests` also cover what the targets of `vouching_for` need, which another stub will be loaded for.
    Raises `ConfigError` if the checkpoint lacks one of them.
    """
    checkpoint = Checkpoint(name)
    config = read_config(checkpoint.folder)
    with building(f"teacher {name}", then=ITS_CONFIG):
        deepest, all_tensors = deepest_layer(targets), _model_tensors(config)
    tensors = needed_tensors(all_tensors, config, deepest=deepest)
    others = needed_tensors(all_tensors, config, deepest=deepest_layer(vouching_for or {}))
    known = checkpoint.tensor_digests({*tensors, *others})
    return TeacherPlan(
        checkpoint=checkpoint,
        config=config,
        facts=teacher_facts(name, config),
        targets=targets,
        deepest=deepest,
        tensors=tuple(tensors),
        digest=digest_of_tensors({name: known[name] for name in tensors}),
        digests=_by_group(known),
    )


def whole_groups(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """As `TeacherPlan.digests`, of all that a whole model reads of a checkpoint; `known`: its tensors' digests."""
    config = read_config(folder)
    names = needed_tensors(_model_tensors(config), config, deepest=None)
    return _by_group({name: known[name] for name in names if name in known})


def _by_group(digests: Mapping[str, str]) -> dict[str, str]:
    groups: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        groups.setdefault(_group(name), {})[name] = digest
    return {group: digest_of_tensors(of_group) for group, of_group in sorted(groups.items())}


def _group(name: str) -> str:
    if name.startswith((TOWER_PREFIX, "model.mm_projector.")):
        return "vision"
    if layer := DECODER_LAYER.match(name):
        return f"layer {layer[1]} attention" if layer[2] in TAPPED else f"layer {layer[1]}"
    return "embeddings" if name == "model.embed_tokens.weight" else "head"


def load_teacher(plan: TeacherPlan, *, dtype: torch.dtype, device: torch.device) -> Teacher:
    """Load the planned tensors, and no others, in evaluation mode."""
    model = _empty_model(plan.config)
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
    # What is not needed stays on the meta device: a mistake in the plan fails loudly, it cannot go unseen.
    model.load_state_dict(weights, strict=False, assign=True)
    _materialise_buffers(model, device)
    if plan.deepest is None:
        model.tie_weights()
    else:
        _cut(model, plan.deepest)
    return Teacher(model.eval().requires_grad_(False), plan)


def needed_tensors(names: Sequence[str], config: MobileVLMConfig, *, deepest: int | None) -> list[str]:
    """Of a model's tensors, those that a teacher asked for layers up to `deepest` reads (None: all)."""
    tower_layers = None
    if isinstance(config.tower, CLIPVisionConfig):
        tower_layers = range(config.tower.num_hidden_layers + 1)[config.mm_vision_select_layer]
    return [name for name in sorted(names) if _is_needed(name, tower_layers, deepest)]


def _is_needed(name: str, tower_layers: int | None, deepest: int | None) -> bool:
    if name.startswith(TOWER_PREFIX):
        return tower_layers is None or _is_before_layer(name, tower_layers)
    if "rotary_emb" in name:
        return False
    if deepest is None or name.startswith("model.mm_projector."):
        return True
    if name == "model.embed_tokens.weight":
        return deepest >= 0
    layer = DECODER_LAYER.match(name)
    return layer is not None and (
        int(layer[1]) < deepest or (int(layer[1]) == deepest and layer[2] in TAPPED)
    )


def _is_before_layer(name: str, tower_layers: int) -> bool:
    """Whether a tensor of the CLIP tower is read when its first `tower_layers` layers run."""
    layer = TOWER_LAYER.match(name)
    after_selected = layer is not None and int(layer[1]) >= tower_layers
    return not (after_selected or "post_layernorm" in name or "position_ids" in name)


def _empty_model(config: MobileVLMConfig) -> MobileVLMForCausalLM:
    with torch.device("meta"):
        return MobileVLMForCausalLM(deepcopy(config))  # a stub's own is cut to the layers that it runs


def _model_tensors(config: MobileVLMConfig) -> list[str]:
    """Names of all tensors that a complete checkpoint of this config holds."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return [name for name in _empty_model(config).state_dict() if name not in tied]


def _cut(model: MobileVLMForCausalLM, deepest: int) -> None:
    """Run only the layers below the deepest one asked for; its input is then what the model returns."""
    model.model.config.num_hidden_layers = max(deepest, 0)
    model.model.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]


def _materialise_buffers(model: MobileVLMForCausalLM, device: torch.device) -> None:
    """Non-persistent buffers (rotary frequencies, tower positions) are in no checkpoint: compute them."""
    if isinstance(model.config.tower, CLIPVisionConfig):
        embeddings: Any = model.get_submodule(f"{TOWER_PREFIX}vision_tower.vision_model.embeddings")
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
