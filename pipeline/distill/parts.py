"""The parts of a training: samples and collator, the student, and its losses. Stage 2 is made of them."""

from __future__ import annotations

import sys
from typing import Any

import torch

from cache import Store
from pipeline.config.config import Config, DataConfig
from pipeline.data.load_preparation import load_preparation
from pipeline.data.pairing import check_pair, targets_read
from pipeline.data.shard_kinds import part_name
from pipeline.data.shard_names import expand_shards
from pipeline.data.spans import SpanReader
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.recompute import RecomputedTargets, load_recomputed
from pipeline.distill.join.stores import Stores, open_stores
from pipeline.distill.model.adapters import add_adapters
from pipeline.distill.model.distiller import Distiller
from pipeline.errors import ConfigError, building
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.targets.target import Target, TeacherFacts


def open_dataset(config: Config) -> tuple[JoinedDataset, JoinCollator]:
    """Return the samples that stage 2 trains on, by number, and what makes a batch of them, for a `DataLoader`.

    A sample is a `JoinedSample`; see `JoinCollator` for the batch and its shapes. Opens no weights. Samples that a
    store lacks are reported on stderr. Raises `FingerprintMismatch` if a store is not what this config would have
    cached, and `JoinError` where a sample is read that differs from what the teacher saw.
    """
    preparation = load_preparation(config.student.model, config.data)
    stores = open_stores(config, preparation)
    targets, data = needed_targets(config), config.data
    shards, read = training_shards(data), SpanReader.of(data)
    dataset = JoinedDataset(
        stores,
        shards,
        preparation,
        targets=targets,
        fraction=data.fraction,
        read=read,
        reads_shards=_reads_shards(config),
    )
    for missing in dataset.missing:
        print(f"on_missing: {config.on_missing}: {missing}", file=sys.stderr)
    return dataset, JoinCollator(targets, preparation.image_token_id)


def _reads_shards(config: Config) -> bool:
    """Whether text and images are read: a twig continues what is stored of the base, and needs neither."""
    recomputes = config.on_missing == "recompute" or targets_read(config).intersection(
        config.targets.recomputed()
    )
    return config.twig is None or bool(recomputes)


def training_shards(data: DataConfig) -> dict[str, str]:
    """Return the shards that stage 2 trains on, by their parts. Raises `ConfigError` if all of them are held out."""
    held_out = (
        {part_name(shard) for shard in expand_shards(data.held_out_shards)} if data.held_out_shards else ()
    )
    shards = expand_shards(data.shards)
    if not (left := {part_name(shard): shard for shard in shards if part_name(shard) not in held_out}):
        raise ConfigError(
            f"data.held_out_shards names all {len(shards)} shards of data.shards: nothing is left to train on; hold "
            "fewer of them out"
        )
    return left


def open_held_out(config: Config, training: JoinedDataset) -> JoinedDataset | None:
    """Return the held-out samples, of the stores of the training's; None if the config has none.

    Samples that a store lacks are reported on stderr, or refused, as those of the training are.
    """
    if config.data.held_out_shards is None:
        return None
    dataset = JoinedDataset(
        training.stores,
        config.data.held_out_shards,
        training.preparation,
        targets=training.targets,
        read=training.read,
        reads_shards=training.reads_shards,
    )
    for missing in dataset.missing:
        print(f"on_missing: {config.on_missing}: held out: {missing}", file=sys.stderr)
    return dataset


def needed_targets(config: Config) -> dict[str, Target]:
    """Return the stored targets that the configured losses read, by name."""
    read = targets_read(config)
    return {name: target for name, target in config.targets.cached().items() if name in read}


def load_student(config: Config, *stores: Store) -> Any:
    """Load the student's first weights into its family's class of transformers, with a frozen vision tower.

    Raises `ConfigError` if it cannot be compared with the teacher of one of `stores`.
    """
    shape = read_config(checkpoint_folder(config.student.model))
    for store in stores:
        check_pair(config, shape, TeacherFacts.of(store.manifest), of=store.path)
    student = load_network(config.student.model, dtype=config.student.dtype)
    VisionLanguageModel(student).freeze_tower()
    if config.student.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    return student


def build_distiller(
    config: Config,
    student: Any,
    dataset: JoinedDataset,
    *,
    held_out: JoinedDataset | None = None,
    device: torch.device | str = "cpu",
) -> Distiller:
    """Put a student together with its losses and their heads, which are drawn from torch's random generator.

    With `student.lora` the student gets its adapters, in place. `device` is that of the teacher's stub, which is
    loaded if targets of `dataset` or of `held_out` are recomputed. Raises `ConfigError` if the student cannot be
    compared with a store's teacher.
    """
    shape, stores = read_config(checkpoint_folder(config.student.model)), dataset.stores
    for store in stores.opened:
        check_pair(config, shape, TeacherFacts.of(store.manifest), of=store.path)
    if config.student.lora is not None:
        with building("student.lora", then="correct the section"):
            add_adapters(student, config.student.lora)
    recompute = load_recompute(config, dataset, held_out, device)
    return Distiller(
        student,
        config.losses.active(),
        facts=stores.facts() | (recompute.facts if recompute else {}),
        patch_feature_cache_bytes=config.student.patch_feature_cache_bytes,
        recompute=recompute,
    )


def load_recompute(
    config: Config, dataset: JoinedDataset, held_out: JoinedDataset | None, device: torch.device | str
) -> RecomputedTargets | None:
    """Load the teacher's stub if targets of `dataset` or of `held_out` are recomputed; None if none is."""
    lacking = dataset.lacking() | (frozenset() if held_out is None else held_out.lacking())
    if not targets_read(config):
        return None
    return _recomputed(config, dataset.stores, lacking, torch.device(device))


def _recomputed(
    config: Config, stores: Stores, lacking: frozenset[str], device: torch.device
) -> RecomputedTargets | None:
    """Return the targets that are recomputed during training, with a stub of the teacher; None if there are none."""
    missing = {name: stores.giving(name).store for name in lacking}
    recomputed = sorted({*missing, *targets_read(config).intersection(config.targets.recomputed())})
    if recomputed and not stores.read_alike:
        raise ConfigError(
            f"targets.{recomputed[0]} would be recomputed by a stub of the teacher from what the student sees, "
            "but it reads text or images in another way; store the target with `alignkd teacher-cache`"
        )
    return load_recomputed(config, *stores.opened, device=device, missing=missing)
