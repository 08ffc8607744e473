"""Which tensors of a teacher's checkpoint the targets need, and their digests. No weight is loaded here.

Logits and the final hidden states need the whole model. Everything else needs a stub, a few percent of it: attention
of layer n reads the embeddings, the layers before it, and what query and key of layer n depend on; hidden states read
the embeddings and the layers before them; projected vision features read the tower and the projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import digest_of
from pipeline.errors import ConfigError, building
from pipeline.models.anatomy import anatomy_of, empty_network
from pipeline.models.checkpoint_names import source_names
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint, digest_of_tensors
from pipeline.models.mobilevlm.configuration import USE_ITS_CONFIG
from pipeline.targets.target import Target, TeacherFacts
from pipeline.targets.targets import deepest_layer, hidden_layer


@dataclass(frozen=True)
class TeacherPlan:
    """The tensors of a checkpoint that the targets need.

    `deepest` is the deepest layer read, of those that have attention (-1: none; None: the whole model).
    `tensors` are the model's names -> the checkpoint's.
    `digest` covers exactly these tensors as the checkpoint holds them. A stub and the whole model of one checkpoint
    have different digests; a `.bin` and a safetensors copy have the same.
    `digests` cover groups of tensors: `vision`, `embeddings`, `layer 0 attention`, `layer 0`, ..., `head`. A smaller
    stub of the same checkpoint has the same digest for each group that it reads.
    """

    checkpoint: Checkpoint
    config: Any
    facts: TeacherFacts
    targets: Mapping[str, Target]
    deepest: int | None
    tensors: Mapping[str, str]
    digest: str
    digests: Mapping[str, str]

    @property
    def is_stub(self) -> bool:
        return self.deepest is not None

    @property
    def hidden_layer(self) -> int | None:
        """The layer of the decoder whose input the targets read, of all its layers; None if none does."""
        return hidden_layer(self.targets)


def plan_teacher(
    name: str, *, targets: Mapping[str, Target], vouching_for: Mapping[str, Target] | None = None
) -> TeacherPlan:
    """Find and hash the tensors that the targets need in a checkpoint, a folder or hub id.

    `digests` also cover the targets of `vouching_for`, for which another stub will be loaded later, and the whole
    model where these keep hidden states: a twig that continues them names its base by `base_digest`.
    Raises `ConfigError` if the checkpoint lacks a tensor.
    """
    checkpoint = Checkpoint(name)
    return plan_tensors(
        checkpoint, read_config(checkpoint.folder), targets, name=name, vouching_for=vouching_for
    )


def plan_tensors(
    checkpoint: Checkpoint,
    config: Any,
    targets: Mapping[str, Target],
    *,
    name: str = "",
    vouching_for: Mapping[str, Target] | None = None,
) -> TeacherPlan:
    """Return `plan_teacher`'s plan for a config that is read already, such as one of fewer layers."""
    name = name or str(checkpoint.folder)
    with building(f"teacher {name}", then=USE_ITS_CONFIG):
        facts = facts_of_config(name, config)
        deepest = _within(deepest_layer(targets), facts)
        vouching_for = vouching_for or {}
        others = _within(deepest_layer(vouching_for), facts)
        others = others if hidden_layer(vouching_for) is None else None
        needed = needed_tensors(config, deepest=deepest, hidden=hidden_layer(targets))
        wanted = {*needed, *needed_tensors(config, deepest=others)}
        sources = source_names(empty_network(config), checkpoint.names())
    found = {
        name: sources.get(name, name) for name in wanted
    }  # a name that is not there is reported when it is read
    digests = checkpoint.tensor_digests(found.values())
    known = {name: digests[source] for name, source in found.items()}
    return TeacherPlan(
        checkpoint=checkpoint,
        config=config,
        facts=facts,
        targets=targets,
        deepest=deepest,
        tensors={name: found[name] for name in needed},
        digest=digest_of_tensors({name: known[name] for name in needed}),
        digests=digests_by_group(config, known),
    )


def _within(deepest: int | None, facts: TeacherFacts) -> int | None:
    """Return the deepest layer, or the model's last one: the target reports a layer that the teacher has not."""
    return deepest if deepest is None else min(deepest, facts.num_layers - 1)


def facts_of_config(name: str, config: Any) -> TeacherFacts:
    """Return what stage 2 must know of a teacher, from its config."""
    text = config.get_text_config()
    with building(f"model {name}", then=USE_ITS_CONFIG):
        num_layers = len(anatomy_of(config).attention)
    return TeacherFacts(
        name=name,
        num_layers=num_layers,
        num_heads=text.num_attention_heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        family=config.model_type,
        num_vision_tokens=getattr(config, "num_vision_tokens", None),
    )


def family_digest(config: Any) -> str:
    """Return the digest of what makes a layer index mean the same layer: the family and the kinds of its layers."""
    return digest_of([config.model_type, getattr(config.get_text_config(), "layer_types", None)])


def needed_tensors(config: Any, *, deepest: int | None, hidden: int | None = None) -> list[str]:
    """Return the sorted names of what a teacher reads, as `Anatomy.needed`."""
    return anatomy_of(config).needed(deepest, hidden)


def whole_model_digests(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return `TeacherPlan.digests` of a whole model; `known` holds the digest of each of its tensors."""
    config = read_config(folder)
    sources = source_names(empty_network(config), known)
    names = needed_tensors(config, deepest=None)
    return digests_by_group(config, {name: known[sources[name]] for name in names if name in sources})


def digests_by_group(config: Any, digests: Mapping[str, str]) -> dict[str, str]:
    """Return group -> digest, from the digest of each tensor by the model's name for it."""
    group_of = anatomy_of(config).groups()
    groups: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        groups.setdefault(group_of[name], {})[name] = digest
    return {group: digest_of_tensors(of_group) for group, of_group in sorted(groups.items())}


def base_digest(digests: Mapping[str, str]) -> str:
    """Return one hex digest of a whole model, from the digest of each group of its tensors (`TeacherPlan.digests`).

    Raises `ConfigError` if the groups are of a part of the model.
    """
    if "head" not in digests:  # only a whole model reads the final norm
        raise ConfigError(
            f"a digest of the whole base was asked for, but only {', '.join(digests) or 'nothing'} was hashed; cache "
            "the targets again with targets.hidden_states"
        )
    return digest_of(dict(digests))
