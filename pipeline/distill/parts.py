"""The parts of a training: samples and collator, the student, and its losses. Stage 2 is made of them."""

from __future__ import annotations

import sys
from typing import Any

import torch

from cache import Store
from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.pairing import check_pair, targets_read
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.recompute import RecomputedTargets, load_recomputed
from pipeline.distill.join.stores import open_stores
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
    dataset = JoinedDataset(stores, data.shards, preparation, targets=targets, fraction=data.fraction)
    for missing in dataset.missing:
        print(f"on_missing: {config.on_missing}: {missing}", file=sys.stderr)
    return dataset, JoinCollator(targets, preparation.image_token_id)


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
    config: Config, student: Any, dataset: JoinedDataset, *, device: torch.device | str = "cpu"
) -> Distiller:
    """Put a student together with its losses and their heads, which are drawn from torch's random generator.

    With `student.lora` the student gets its adapters, in place. `device` is that of the teacher's stub, which is
    loaded if targets are recomputed. Raises `ConfigError` if the student cannot be compared with a store's teacher.
    """
    shape, stores = read_config(checkpoint_folder(config.student.model)), dataset.stores
    for store in stores.opened:
        check_pair(config, shape, TeacherFacts.of(store.manifest), of=store.path)
    if config.student.lora is not None:
        with building("student.lora", then="correct the section"):
            add_adapters(student, config.student.lora)
    recompute = _recomputed(config, dataset, torch.device(device)) if targets_read(config) else None
    return Distiller(
        student,
        config.losses.active(),
        facts=stores.facts() | (recompute.facts if recompute else {}),
        patch_feature_cache_bytes=config.student.patch_feature_cache_bytes,
        recompute=recompute,
    )


def _recomputed(config: Config, dataset: JoinedDataset, device: torch.device) -> RecomputedTargets | None:
    """Return the targets that are recomputed during training, with a stub of the teacher; None if there are none."""
    stores = dataset.stores
    missing = {name: stores.giving(name).store for name in dataset.lacking()}
    recomputed = sorted({*missing, *targets_read(config).intersection(config.targets.recomputed())})
    if recomputed and not stores.read_alike:
        raise ConfigError(
            f"targets.{recomputed[0]} would be recomputed by a stub of the teacher from what the student sees, "
            "but it reads text or images in another way; store the target with `alignkd teacher-cache`"
        )
    return load_recomputed(config, *stores.opened, device=device, missing=missing)
