"""Train a twig from the base's stored hidden states, with transformers.Trainer, and without the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from pipeline.config.config import Config
from pipeline.config.twig_settings import check_has_twig
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.parts import load_recompute, open_dataset, open_held_out
from pipeline.distill.run import Job, train
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.errors import building
from pipeline.models.loading import load_network
from pipeline.twig.base import Base
from pipeline.twig.reinforcing.exploring import Exploring
from pipeline.twig.reinforcing.reward import PrunedBase
from pipeline.twig.scaffold import Scaffold
from pipeline.twig.training.base_head import BaseHead
from pipeline.twig.training.beginning import Beginning
from pipeline.twig.training.patience import Patience
from pipeline.twig.training.trained_twig import TrainedTwig, with_adapters
from pipeline.twig.training.twig_distiller import TwigDistiller


def train_twig(
    config: Config, folder: Path, *, overwrite: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Train the config's twig into `folder` and return the folder of the twig itself, `twig` in it.

    With stored hidden states no pixel is read and no base is loaded, and of its weights only those that the twig
    begins with. It resumes, replaces and stops as `train_student` does. Raises `ConfigError` for a config without a
    `twig` section.
    """
    policy = config.losses.active().get("policy")
    if policy is not None and policy.patience is not None:
        callbacks = [*callbacks, Patience(policy.patience)]
    return train(twig_job(config), folder, overwrite=overwrite, callbacks=callbacks)


def twig_job(config: Config) -> Job:
    """Return the training of the config's twig. Raises `ConfigError` for a config without a `twig` section."""
    check_has_twig(config)
    dataset, _ = open_dataset(config)
    held_out = open_held_out(config, dataset)
    beginning = Beginning.of(config, dataset.stores.giving("hidden_states").store)
    identity = RunIdentity.of(config, dataset, held_out, first_weights=beginning.digest)

    def build(arguments: TrainingArguments) -> TwigDistiller:
        set_seed(arguments.seed)
        return build_twig_distiller(config, beginning, dataset, held_out=held_out, device=arguments.device)

    return Job(config, dataset, held_out, identity, TrainedTwig(beginning, dataset), build)


def build_twig_distiller(
    config: Config,
    beginning: Beginning,
    dataset: JoinedDataset,
    *,
    held_out: JoinedDataset | None = None,
    device: torch.device | str = "cpu",
) -> TwigDistiller:
    """Put a twig together with its losses. `device` is that of the scaffold, and of the stub that recomputes."""
    twig = beginning.twig()
    if beginning.settings.lora is not None:
        with_adapters(twig, beginning.settings.lora)
    head = None
    if "prediction" in config.losses.active():
        name = config.teacher.model
        head = BaseHead.load(name, beginning.base_config, dtype=beginning.dtype, device=device)
    return TwigDistiller(
        twig,
        config.losses.active(),
        scaffold=Scaffold(beginning.base_config, dtype=beginning.dtype, device=device),
        patch_feature_cache_bytes=config.student.patch_feature_cache_bytes,
        recompute=load_recompute(config, dataset, held_out, device),
        base_head=head,
        exploring=_exploring(config, beginning, device),
    )


def _exploring(config: Config, beginning: Beginning, device: torch.device | str) -> Exploring | None:
    """Load the base whose word on choices of vision tokens is learned from; None if no loss asks for it."""
    if (policy := config.losses.active().get("policy")) is None:
        return None
    name = config.teacher.model
    network = (
        load_network(name, dtype=str(beginning.dtype).removeprefix("torch.")).eval().requires_grad_(False)
    )
    with building(f"base {name} on a GPU", then="set twig.dtype to bfloat16"):
        base = PrunedBase(Base.of(network.to(device)), beginning.geometry)
    return Exploring(base, policy.keep, group=policy.group, annealing=policy.annealing)
