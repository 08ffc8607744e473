"""Which tensors of a teacher's checkpoint the targets need, and their digests. No weight is loaded here.

Logits need the whole model. Everything else needs a stub, a few percent of it: attention of layer n reads the
embeddings, layers 0 to n-1, and norm, q and k of layer n; projected vision features read the tower up to the
selected layer and the projector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from pipeline.errors import building
from pipeline.models.checkpoint import Checkpoint, digest_of_tensors
from pipeline.models.configuration import USE_ITS_CONFIG, read_config
from pipeline.models.mobilevlm import TOWER_PREFIX, MobileVLMConfig, MobileVLMForCausalLM
from pipeline.targets.target import Target, TeacherFacts
from pipeline.targets.targets import deepest_layer

PROJECTOR_PREFIX = "model.mm_projector."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DECODER_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
TOWER_LAYER = re.compile(r".*\.encoder\.layers\.(\d+)\.")
# What the attention of a layer needs of that layer itself.
TAPPED = ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight")


@dataclass(frozen=True)
class TeacherPlan:
    """The tensors of a checkpoint that the targets need.

    `deepest` is the deepest decoder layer read (-1: none; None: the whole model).
    `digest` covers exactly these tensors as the checkpoint holds them. A stub and the whole model of one checkpoint
    have different digests; a `.bin` and a safetensors copy have the same.
    `digests` cover groups of tensors: `vision`, `embeddings`, `layer 0 attention`, `layer 0`, ..., `head`. A smaller
    stub of the same checkpoint has the same digest for each group that it reads.
    """

    checkpoint: Checkpoint
    config: MobileVLMConfig
    facts: TeacherFacts
    targets: Mapping[str, Target]
    deepest: int | None
    tensors: tuple[str, ...]
    digest: str
    digests: Mapping[str, str]

    @property
    def is_stub(self) -> bool:
        return self.deepest is not None


def plan_teacher(
    name: str, *, targets: Mapping[str, Target], vouching_for: Mapping[str, Target] | None = None
) -> TeacherPlan:
    """Find and hash the tensors that the targets need in a checkpoint, a folder or hub id.

    `digests` also cover the targets of `vouching_for`, for which another stub will be loaded later.
    Raises `ConfigError` if the checkpoint lacks a tensor.
    """
    checkpoint = Checkpoint(name)
    config = read_config(checkpoint.folder)
    with building(f"teacher {name}", then=USE_ITS_CONFIG):
        deepest = deepest_layer(targets)
        tensors = needed_tensors(config, deepest=deepest)
        others = needed_tensors(config, deepest=deepest_layer(vouching_for)) if vouching_for else []
    known = checkpoint.tensor_digests({*tensors, *others})
    return TeacherPlan(
        checkpoint=checkpoint,
        config=config,
        facts=facts_of_config(name, config),
        targets=targets,
        deepest=deepest,
        tensors=tuple(tensors),
        digest=digest_of_tensors({name: known[name] for name in tensors}),
        digests=_digests_by_group(known),
    )


def facts_of_config(name: str, config: MobileVLMConfig) -> TeacherFacts:
    """Return what stage 2 must know of the teacher, from its config."""
    return TeacherFacts(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        num_vision_tokens=config.num_vision_tokens,
        vocab_size=config.vocab_size,
    )


def needed_tensors(config: MobileVLMConfig, *, deepest: int | None) -> list[str]:
    """Return the sorted names of the tensors that a teacher reads up to layer `deepest` (None: the whole model)."""
    names = sorted(empty_model(config).state_dict())
    return [name for name in names if _is_needed(name, config, deepest)]


def empty_model(config: MobileVLMConfig) -> MobileVLMForCausalLM:
    """Build the model without weights: all its parameters are on the meta device."""
    with torch.device("meta"):
        return MobileVLMForCausalLM(config)


def _is_needed(name: str, config: MobileVLMConfig, deepest: int | None) -> bool:
    if name.startswith(TOWER_PREFIX):
        return _is_read_in_tower(name, config)
    if name == HEAD and config.tie_word_embeddings:
        return False
    if deepest is None or name.startswith(PROJECTOR_PREFIX):
        return True
    if name == EMBEDDINGS:
        return deepest >= 0
    layer = DECODER_LAYER.match(name)
    return layer is not None and (
        int(layer[1]) < deepest or (int(layer[1]) == deepest and layer[2] in TAPPED)
    )


def _is_read_in_tower(name: str, config: MobileVLMConfig) -> bool:
    if not isinstance(config.tower, CLIPVisionConfig):
        return True
    num_layers = range(config.tower.num_hidden_layers + 1)[config.mm_vision_select_layer]
    layer = TOWER_LAYER.match(name)
    return int(layer[1]) < num_layers if layer else "post_layernorm" not in name


def whole_model_digests(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return `TeacherPlan.digests` of a whole model; `known` holds the digest of each of its tensors."""
    names = needed_tensors(read_config(folder), deepest=None)
    return _digests_by_group({name: known[name] for name in names if name in known})


def _digests_by_group(digests: Mapping[str, str]) -> dict[str, str]:
    groups: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        groups.setdefault(_group(name), {})[name] = digest
    return {group: digest_of_tensors(of_group) for group, of_group in sorted(groups.items())}


def _group(name: str) -> str:
    if name.startswith((TOWER_PREFIX, PROJECTOR_PREFIX)):
        return "vision"
    if layer := DECODER_LAYER.match(name):
        return f"layer {layer[1]} attention" if layer[2] in TAPPED else f"layer {layer[1]}"
    return "embeddings" if name == EMBEDDINGS else "head"
