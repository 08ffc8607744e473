"""The sources of a stored sample: its config, its shard, and the tokenizer of its text."""

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
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation
from pipeline.data.shard_kinds import part_name
from pipeline.data.shard_names import expand_shards
from pipeline.data.spans import check_ranges
from pipeline.data.template_preparation import TemplatePreparation
from pipeline.errors import ConfigError, PipelineError, ShardError
from pipeline.targets.target import TeacherFacts

MOST_KEYS_TO_COMPARE = 100_000
REMEDY = (
    "give a config whose `data` section, and whose student's tokenizer and preprocessing, are those of stage 1 "
    "(`alignkd info` shows it)"
)


def stored_config(store: Store) -> Config:
    """Return the config of stage 1, from the store; raises `ConfigError` if the store has none that is valid here."""
    try:
        return Config.model_validate(store.manifest.provenance["config"])
    except (KeyError, ValidationError) as error:
        found = "none" if isinstance(error, KeyError) else "one that this version does not read"
        raise ConfigError(
            f"{store.path}: asked for the config of stage 1 in its manifest, found {found}; give --config"
        ) from error


def locate_sample(store: Store, key: str) -> tuple[str, SampleEntry]:
    """Return a sample's part and entry; raises `PipelineError` with similar keys, or `KeyNotInStore` without."""
    try:
        return store.locate(key)
    except KeyNotInStore as error:
        few = len(store) <= MOST_KEYS_TO_COMPARE  # these take about a second
        if few and (near := difflib.get_close_matches(key, list(store.keys()), n=3)):
            raise PipelineError(f"{error} Keys like it: {', '.join(map(repr, near))}.") from error
        raise


def find_shard(config: Config, part: str, key: str) -> str:
    """Return the shard of a part, by its name; raises `ConfigError` if it is not among the config's shards."""
    named = config.data.captured_shards()
    try:
        paths = expand_shards(named)
        found = f"{len(paths)} shards of other names"
    except ShardError as error:
        paths, found = [], f"nothing ({error})"
    if shard := next((path for path in paths if part_name(path) == part), None):
        check_ranges([shard])
        return shard
    raise ConfigError(
        f"sample {key!r} is in {part}.tar: looked in data.shards, {', '.join(named)}, and found {found}; "
        "give a --config whose data.shards says where the shard is now"
    )


def find_preparation(config: Config, store: Store) -> tuple[Preparation, str]:
    """Return the preparation of the student, or else of the teacher, and ""; opens no weights.

    If neither has a tokenizer on this machine, return a preparation without one, and the reason. Raises
    `FingerprintMismatch` if the preparation reads text or images in another way than the teacher did.
    """
    reasons = []
    refused: FingerprintMismatch | None = None
    for name, model in (("student.model", config.student.model), ("teacher.model", config.teacher.model)):
        if (folder := _local_folder(model)) is None:
            reasons.append(f"{name} {model} is not here")
            continue
        try:
            preparation = load_preparation(folder, config.data)
        except PipelineError as error:
            reasons.append(f"{name}: {error}")
            continue
        try:
            check_reading(store, preparation)
        except FingerprintMismatch as error:
            refused = refused or error
            continue
        return preparation, ""
    if refused is not None:
        raise refused
    facts = TeacherFacts.of(store.manifest)
    if facts.num_vision_tokens is None:
        raise ConfigError(
            f"{store.path}: its samples are read by the processor of a model, and none is here: "
            f"{'; '.join(reasons)}; copy the processor's files of the teacher or the student to this machine"
        )
    # MobileVLM V2's images can be read without a model, by the constants of CLIP, which published checkpoints use.
    data = config.data
    images = ImagePreprocessor.from_pretrained(
        config.teacher.model, aspect_ratio=data.image_aspect_ratio, max_pixels=data.max_image_pixels
    )
    without = TemplatePreparation.with_images(
        images, data, tokenizer=None, num_vision_tokens=facts.num_vision_tokens
    )
    return without, "; ".join(reasons)


def check_reading(store: Store, preparation: Preparation) -> None:
    """Raise `FingerprintMismatch` unless text and images are read as the store's teacher did."""
    stored = store.manifest.fingerprint
    if differences := stored.differences(replace(stored, **preparation.digests())):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)


def _local_folder(model: str) -> str | None:
    """Return the model's folder, or the snapshot of an earlier download; downloads nothing."""
    if Path(model).is_dir():
        return model
    try:
        return snapshot_download(model, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
