"""Finds what a stored sample was made from: its config, its shard, and the tokenizer that its text was read with."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError

from cache import FingerprintMismatch, KeyNotInStore, SampleEntry, Store
from pipeline.config.config import Config
from pipeline.data.images import ImagePreprocessor
from pipeline.data.preparation import Preparation
from pipeline.data.shards import expand_shards
from pipeline.distill.join.dataset import teacher_facts
from pipeline.errors import ConfigError, PipelineError, ShardError

MOST_KEYS_TO_COMPARE = 100_000
REMEDY = (
    "give a config whose `data` section, and whose student's tokenizer and preprocessing, are those of stage 1 "
    "(`alignkd info` shows it)"
)


def stored_config(store: Store) -> Config:
    """The config that stage 1 ran with. Raises `ConfigError` if the store does not carry one that is read here."""
    try:
        return Config.model_validate(store.manifest.provenance["config"])
    except (KeyError, ValidationError) as error:
        found = "none" if isinstance(error, KeyError) else "one that this version does not read"
        raise ConfigError(
            f"{store.path}: asked for the config of stage 1 in its manifest, found {found}; give --config"
        ) from error


def locate_sample(store: Store, key: str) -> tuple[str, SampleEntry]:
    """A sample's part and entry. Raises `PipelineError` naming keys like it, else the store's `KeyNotInStore`."""
    try:
        return store.locate(key)
    except KeyNotInStore as error:
        few = len(store) <= MOST_KEYS_TO_COMPARE  # so many take about a second
        near = difflib.get_close_matches(key, list(store.keys()), n=3) if few else []
        if not near:
            raise
        raise PipelineError(f"{error} Keys like it: {', '.join(map(repr, near))}.") from error


def find_shard(config: Config, part: str, key: str) -> str:
    """The tar that a part was made from, by its name. Raises `ConfigError` if the config's shards do not hold it."""
    try:
        paths = expand_shards(config.data.shards)
        found = f"{len(paths)} shards of other names"
    except ShardError as error:
        paths, found = [], f"nothing ({error})"
    for path in paths:
        if Path(path).name == f"{part}.tar":
            return path
    raise ConfigError(
        f"sample {key!r} is in {part}.tar: looked in data.shards, {config.data.shards}, and found {found}; "
        "give a --config whose data.shards says where the shard is now"
    )


def find_preparation(config: Config, store: Store) -> tuple[Preparation, str]:
    """How text and images were read: from the student's folder, else the teacher's; no weight is opened.

    Where neither has a tokenizer at hand, the preparation has none and the second value says why. Raises
    `FingerprintMismatch` if the one that is found reads otherwise than the teacher did.
    """
    reasons = []
    for name, model in (("student.model", config.student.model), ("teacher.model", config.teacher.model)):
        if (folder := _local_folder(model)) is None:
            reasons.append(f"{name} {model} is not here")
            continue
        try:
            preparation = Preparation.of(folder, config.data)
        except PipelineError as error:
            reasons.append(f"{name}: {error}")
            continue
        check_reading(store, preparation)
        return preparation, ""
    return _without_tokenizer(config, store), "; ".join(reasons)


def check_reading(store: Store, preparation: Preparation) -> None:
    """Raise `FingerprintMismatch` unless text and images are read as the store's teacher read them."""
    stored = store.manifest.fingerprint
    if differences := stored.differences(replace(stored, **preparation.digests())):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)


def _local_folder(model: str) -> str | None:
    """The model's folder, or a hub model's snapshot from an earlier download: to look at a sample fetches nothing."""
    if Path(model).is_dir():
        return model
    try:
        return snapshot_download(model, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _without_tokenizer(config: Config, store: Store) -> Preparation:
    """Images can be read all the same, with the constants of CLIP that published checkpoints have."""
    data = config.data
    preprocess = ImagePreprocessor.from_pretrained(
        config.teacher.model, aspect_ratio=data.image_aspect_ratio, max_pixels=data.max_image_pixels
    )
    num_vision_tokens = teacher_facts(store).num_vision_tokens
    return Preparation(None, preprocess, data.template, data.max_length, num_vision_tokens)
