"""Which base a twig belongs to: the digests of its tensors, as its checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.anatomy import anatomy_of
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint, digest_of_tensor
from pipeline.models.teacher_plan import base_digest, digests_by_group, plan_tensors
from pipeline.targets.logits import LogitsTarget

SHOWN = 3  # groups that differ, in a message


@dataclass(frozen=True)
class BaseIdentity:
    """A base: the folder or hub id that it came from, its sizes, and the digest of each group of its tensors.

    The groups are those of a store's manifest: `vision`, `embeddings`, `layer 0 attention`, `layer 0`, ..., `head`.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    digests: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One digest over all groups."""
        return base_digest(self.digests)

    @classmethod
    def of_checkpoint(cls, name: str) -> BaseIdentity:
        """Return the identity of a checkpoint, a folder or hub id; reads all its tensors once."""
        checkpoint = Checkpoint(name)
        plan = plan_tensors(checkpoint, read_config(checkpoint.folder), {"logits": LogitsTarget()}, name=name)
        return cls.of_config(name, plan.config, plan.digests)

    @classmethod
    def of_network(cls, network: Any) -> BaseIdentity:
        """Return the identity of a model in memory, in the dtype that it has there."""
        state = network.state_dict()
        digests = {name: digest_of_tensor(state[name]) for name in anatomy_of(network.config).needed(None)}
        return cls.of_config(network.name_or_path, network.config, digests_by_group(network.config, digests))

    @classmethod
    def of_config(cls, name: str, config: Any, digests: Mapping[str, str]) -> BaseIdentity:
        text = config.get_text_config()
        sizes = (len(anatomy_of(config).attention), text.hidden_size, text.vocab_size)
        return cls(name, config.model_type, *sizes, digests)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "digests": dict(self.digests), "digest": self.digest}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> BaseIdentity:
        """Return what `to_json` wrote. Raises `ValueError` if its digests are not those of its `digest`."""
        made = cls(**{name: value for name, value in fields.items() if name != "digest"})
        is_whole = isinstance(made.digests, Mapping) and "head" in made.digests
        if not is_whole or made.digest != fields.get("digest"):
            raise ValueError("base: its digests are not those that its digest was made of")
        return made

    def check_is(self, network: Any, *, asked_by: str) -> None:
        """Raise `ConfigError` unless a model in memory is this base.

        Its tensors are compared where they have the dtype of the base's checkpoint. Where they have another one, they
        were converted, and the checkpoint that the model was loaded from is compared.
        """
        self._check_sizes(network, asked_by)
        source = network.name_or_path
        is_converted = _was_converted(network, source)
        found = BaseIdentity.of_checkpoint(source) if is_converted else BaseIdentity.of_network(network)
        differing = [group for group, digest in self.digests.items() if found.digests.get(group) != digest]
        if differing:
            named = ", ".join(differing[:SHOWN]) + (" and others" if len(differing) > SHOWN else "")
            raise ConfigError(
                f"{asked_by} belongs to the base {self.name} ({self.digest[:12]}), but was asked to work on "
                f"{source or 'a model in memory'} ({found.digest[:12]}), which differs in {named}; use its own base, "
                "or train a twig for this one"
            )

    def _check_sizes(self, network: Any, asked_by: str) -> None:
        found = BaseIdentity.of_config(network.name_or_path, network.config, {})
        for field in ("family", "num_layers", "hidden_size", "vocab_size"):
            if getattr(self, field) != getattr(found, field):
                raise ConfigError(
                    f"{asked_by} belongs to a base with {field} {getattr(self, field)}, but this model has "
                    f"{getattr(found, field)}; use its own base, {self.name}, or train a twig for this one"
                )


def _was_converted(network: Any, source: str) -> bool:
    """Whether a model in memory has another dtype than the checkpoint that it was loaded from."""
    if not source or not Path(source).exists():
        return False
    checkpoint = Checkpoint(source)
    _, tensor = next(
        checkpoint.tensors([name for name in checkpoint.names() if name.endswith(".weight")][-1:])
    )
    return tensor.dtype != network.dtype
