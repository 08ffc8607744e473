"""What a twig begins with: where it grows, on which base, and its first weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import Difference, FingerprintMismatch, Store, digest_of, hash_file
from pipeline.config.config import Config
from pipeline.config.twig_settings import OWN_FIRST_WEIGHTS, TwigConfig, check_has_twig
from pipeline.errors import ConfigError, building
from pipeline.models.anatomy import anatomy_of, empty_network
from pipeline.models.checkpoint_names import source_names
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint, checkpoint_folder
from pipeline.models.teacher_plan import digests_by_group, facts_of_config
from pipeline.targets.target import TeacherFacts
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.folder import (
    DRAFT_IDS,
    WEIGHTS,
    fill_twig,
    first_weights,
    read_tensors,
    read_twig_config,
)
from pipeline.twig.geometry import Geometry, geometry_of
from pipeline.twig.module import Twig
from pipeline.twig.pruning_head import PruningHead
from pipeline.twig.training.base_head import names_of_head

REMEDY = (
    "give the base that the store was made with as teacher.model, or run `alignkd teacher-cache` with this config "
    "into a new store"
)
SOME_TOKENS = 100  # where images differ: whether a share is possible does not depend on their vision tokens
SIZES = ("family", "num_layers", "hidden_size", "vocab_size")


@dataclass(frozen=True)
class Beginning:
    """A twig before its first step, without its tensors.

    `base_config` is that of the base's checkpoint, and `store` has its hidden states. `reads_head` says that a loss
    compares with the logits of the base's own head, `trains_head_alone` that only the pruning head is trained.
    """

    settings: TwigConfig
    base_config: Any
    geometry: Geometry
    base: BaseIdentity
    store: Store
    reads_head: bool = False
    trains_head_alone: bool = False

    @classmethod
    def of(cls, config: Config, store: Store) -> Beginning:
        """Return the beginning of the config's twig; `store` is the one with the base's hidden states.

        Opens the config of the base, and no weight if the store names the base's digests. Raises `ConfigError` for a
        base that cannot have such a twig, or which is not that of the store.
        """
        settings, name = check_has_twig(config), config.teacher.model
        base_config = read_config(checkpoint_folder(name))
        facts = facts_of_config(name, base_config)
        _check_sizes(facts, store)
        _check_layer(config, settings, store)
        if settings.lora is not None and settings.first_weights == "random":
            raise ConfigError(
                "twig.lora: adapters train nothing else of a layer, and first_weights `random` leaves that random; "
                "set twig.first_weights to copy, or twig.lora to null"
            )
        geometry = geometry_of(settings, facts.num_layers)
        _check_shares(config, geometry, facts.num_vision_tokens or SOME_TOKENS)
        Twig.empty(base_config, geometry)  # raises for a family without a twig
        identity = _identity(name, base_config, store)
        losses = config.losses.active()
        return cls(
            settings, base_config, geometry, identity, store, "prediction" in losses, "policy" in losses
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the twig's weights."""
        if self.settings.dtype != "auto":
            return getattr(torch, self.settings.dtype)
        return self.base_config.dtype or torch.float32

    @property
    def digest(self) -> str:
        """A digest of the first weights. Raises `FingerprintMismatch` if their checkpoint is not the store's base."""
        first = self.settings.first_weights
        if first not in OWN_FIRST_WEIGHTS:
            self._of_trained_twig(Path(first))  # raises for what is no such twig
            return digest_of([self.base.digest, hash_file(Path(first) / WEIGHTS)])
        of_groups = dict(self._digests())
        return digest_of([self.base.digest, of_groups or "random"])

    def _digests(self) -> Iterator[tuple[str, str]]:
        """Yield the digests of the groups of tensors that are read of the base, compared with those of the store."""
        known = self._digests_of_tensors()
        groups = anatomy_of(self.base_config).groups()
        names_of: dict[str, set[str]] = {}
        for name, group in groups.items():
            names_of.setdefault(group, set()).add(name)
        for group, digest in digests_by_group(self.base_config, known).items():
            yield group, digest
            expected = self.base.digests.get(group)
            if names_of[group] <= known.keys() and expected != digest:
                difference = Difference(f"teacher: {group}", expected or "none", digest)
                raise FingerprintMismatch(self.store.path, [difference], remedy=REMEDY)

    def _digests_of_tensors(self) -> Mapping[str, str]:
        """Return the digest of each tensor that is read of the base, by the base's name for it."""
        network = empty_network(self.base_config)
        names = set(names_of_head(network).values()) if self.reads_head else set()
        if self.settings.first_weights == "copy":
            names |= set(Twig.empty(self.base_config, self.geometry).names_in_base(self.base_config).values())
        if not names:
            return {}
        checkpoint = Checkpoint(self.base.name)
        sources = source_names(network, checkpoint.names())
        found = {name: sources.get(name, name) for name in names}
        digests = checkpoint.tensor_digests(set(found.values()))
        return {name: digests[source] for name, source in found.items()}

    def empty_twig(self) -> Twig:
        """Return the twig without weights."""
        prunes = self.settings.pruning_head
        return Twig.empty(self.base_config, self.geometry, dtype=self.dtype, prunes=prunes)

    def twig(self) -> Twig:
        """Return the twig with its first weights; random ones are drawn from torch's random generator."""
        made = self.empty_twig()
        with building(f"twig of {self.base.name}", then="correct the `twig` section"):
            first = self.settings.first_weights
            if first == "copy":
                checkpoint = Checkpoint(self.base.name)
                tensors = first_weights(made, checkpoint, self.base_config, dtype=self.dtype)
                fill_twig(made, tensors | _drawn(made.pruning_head), source=self.base.name)
            elif first == "random":
                _draw(made, self.base_config)
            else:
                fill_twig(made, self._of_trained_twig(Path(first)), source=first)
        made.gradient_checkpointing = self.settings.gradient_checkpointing
        made.requires_grad_(not self.trains_head_alone)
        if made.pruning_head is not None:
            made.pruning_head.requires_grad_(True)
        return made

    def _of_trained_twig(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors of a trained twig. Raises `ConfigError` if it is another base's, or grows elsewhere."""
        geometry, base = read_twig_config(folder)
        if geometry != self.geometry or base.digest != self.base.digest:
            raise ConfigError(
                f"twig.first_weights: {folder} is a twig at {geometry} of {base.name} ({base.digest[:12]}), and one "
                f"at {self.geometry} of {self.base.name} ({self.base.digest[:12]}) was asked for; give the folder of "
                "a twig of this base and place, or change the `twig` section"
            )
        tensors = read_tensors(folder)
        _check_pruning_head(self.settings, folder, tensors)
        return {name: one.to(self.dtype) for name, one in tensors.items() if name != DRAFT_IDS}


def _drawn(pruning_head: PruningHead | None) -> dict[str, Tensor]:
    """Return first weights of a pruning head without weights, as the twig names them."""
    if pruning_head is None:
        return {}
    made = copy.deepcopy(pruning_head).to_empty(device="cpu")
    made.draw()
    return made.state_dict(prefix="pruning_head.")


def _draw(twig: Twig, base_config: Any) -> None:
    """Give a twig without weights the first weights that its family has before any training."""
    decoder = empty_network(base_config).get_decoder()
    twig.to_empty(device="cpu")
    for module in twig.modules():
        decoder._init_weights(module)
    if twig.pruning_head is not None:
        twig.pruning_head.draw()


def _check_sizes(facts: TeacherFacts, store: Store) -> None:
    theirs = TeacherFacts.of(store.manifest)
    for field in SIZES:
        if getattr(facts, field) != getattr(theirs, field):
            raise ConfigError(
                f"twig: {field} of the base teacher.model {facts.name} is {getattr(facts, field)}, but {store.path} "
                f"was made with a teacher of {getattr(theirs, field)}; {REMEDY}"
            )


def _check_shares(config: Config, geometry: Geometry, num_tokens: int) -> None:
    """Raise `ConfigError` for a share that no choice of vision tokens can have, before a training meets it."""
    settings, policy = check_has_twig(config), config.losses.active().get("policy")
    asked = [("twig", settings.keep)] if settings.keep is not None else []
    asked += [("losses.policy", share) for share in policy.keep] if policy is not None else []
    for section, share in asked:
        try:
            geometry.num_kept(num_tokens, share)
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from error


def _check_pruning_head(settings: TwigConfig, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` unless a trained twig has a pruning head just if one is asked for."""
    has_one = any(name.startswith("pruning_head.") for name in tensors)
    if has_one != settings.pruning_head:
        found, asked = ("a", "false") if has_one else ("no", "true")
        raise ConfigError(
            f"twig.first_weights: {folder} has {found} pruning head, and twig.pruning_head: {asked} was asked for; "
            "give the folder of another twig, or change that"
        )


def _check_layer(config: Config, settings: TwigConfig, store: Store) -> None:
    """Raise `ConfigError` if a store of another layer was let in by `allow_mismatch`: no twig learns from it."""
    stored = store.manifest.capture["targets"].get("hidden_states", {}).get("layer", settings.attach_layer)
    if "hidden_states" in config.targets.cached() and stored != settings.attach_layer:
        raise ConfigError(
            f"twig.attach_layer is {settings.attach_layer}, but {store.path} holds the hidden states after layer "
            f"{stored}, which allow_mismatch cannot excuse; {REMEDY}"
        )


def _identity(name: str, base_config: Any, store: Store) -> BaseIdentity:
    """Return the base's identity, from the store if that knows the whole base, else from the checkpoint."""
    digests = store.manifest.teacher.get("digests", {})
    if set(anatomy_of(base_config).groups().values()) <= digests.keys():
        return BaseIdentity.of_config(name, base_config, digests)
    return BaseIdentity.of_checkpoint(name)
