"""The settings for somebody's data and models, each with the reason, from a look at some samples."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.config.config import Config, DataConfig
from pipeline.data.conversation import TokenizedSample
from pipeline.data.decoding import image_size
from pipeline.data.load_preparation import load_preparation
from pipeline.data.pairing import check_student
from pipeline.data.preparation import Preparation
from pipeline.data.shards import Sample, read_shard
from pipeline.errors import BadSample, ConfigError
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.positions import IGNORE_INDEX
from pipeline.upkeep.slices import evenly

MEASURED = 256  # samples
SHARDS_MEASURED = 8
NO_LIMIT = 10**9  # for measuring: the config gets a limit from what is found
TEMPLATES = ("v1", "chatml")  # MobileVLM V2's; which one fits is decided by the tokenizer
TARGETS = {"attention": {"layers": [0], "heads": "mean"}, "vision": {}, "logits": {"top_k": 32}}
LOSSES = {
    "supervised": {"weight": 1.0},
    "attention": {"weight": 1.0, "distance": "kl", "heads": "mean", "layers": [[0, 0]]},
    "vision_all": {"weight": 0.1},
    "logits": {"weight": 0.1, "direction": "reverse"},
}
BATCH_SIZE = 8
STEPS = 200  # at least: a student of fewer has hardly moved, and its result says nothing
MAX_EPOCHS = 50
OF_IMAGES = ("attention", "vision_all", "vision_focus")  # losses that compare images token by token


@dataclass(frozen=True)
class Measured:
    """What some samples are like: pixels of images, tokens of samples and of answers, and what is unusable."""

    samples: int
    rejected: dict[str, int]
    widths: tuple[int, ...]
    heights: tuple[int, ...]
    lengths: tuple[int, ...]
    vision_tokens: tuple[int, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Losses:
    """The losses and targets that fit teacher and student, and why others do not."""

    targets: dict[str, Any]
    losses: dict[str, Any]
    note: str


@dataclass(frozen=True)
class Epochs:
    """How often the data is trained on, and why."""

    number: int
    reason: str


def preparation_for(teacher: str, model: PreTrainedConfig) -> Preparation:
    """Return the teacher's preparation with the template that fits it, and no limit of length."""
    names = TEMPLATES if isinstance(model, MobileVLMConfig) else ("chat",)
    for name in names:
        preparation = load_preparation(teacher, DataConfig(shards="", template=name, max_length=NO_LIMIT))
        try:
            preparation.prompt([{"from": "human", "value": "Hello"}], [])
        except ConfigError:
            if name == names[-1]:
                raise
            continue
        return preparation
    raise AssertionError


def measure(shards: Sequence[str], preparation: Preparation) -> Measured:
    """Read the first samples of a few shards through a model's processor."""
    chosen = evenly(list(shards), SHARDS_MEASURED)
    each = -(-MEASURED // len(chosen))
    samples = [sample for shard in chosen for sample in islice(read_shard(shard), each)]
    rejected: dict[str, int] = {}
    tokens: list[TokenizedSample] = []
    sizes: list[tuple[int, int]] = []
    for sample in samples:
        try:
            if not isinstance(sample, Sample):
                raise BadSample(sample.reason.partition(": ")[0])
            tokens.append(preparation.tokenize(sample.conversations, preparation.sizes_of(sample.images)))
            sizes += [image_size(image, max_pixels=preparation.max_pixels) for image in sample.images]
        except BadSample as error:
            rejected[error.kind] = rejected.get(error.kind, 0) + 1
    if not tokens:
        raise ConfigError(f"none of {len(samples)} samples can be used: {rejected}; see docs/data.md")
    return Measured(
        samples=len(samples),
        rejected=rejected,
        widths=tuple(width for width, _ in sizes),
        heights=tuple(height for _, height in sizes),
        lengths=tuple(len(sample.input_ids) for sample in tokens),
        vision_tokens=tuple(size for sample in tokens for size in sample.sizes),
        answers=tuple(sum(label != IGNORE_INDEX for label in sample.labels) for sample in tokens),
    )


def max_length_for(found: Measured, model: PreTrainedConfig) -> int:
    """Return a limit of length a quarter above the longest sample, within what the teacher can read.

    Raises `ConfigError` if all samples are longer than that.
    """
    most = getattr(model.get_text_config(), "max_position_embeddings", NO_LIMIT)
    if min(found.lengths) > most:
        raise ConfigError(
            f"samples are {in_words(found.lengths)} tokens long, and the teacher reads {most:,}; shorten "
            "their texts, or name another teacher"
        )
    return min(most, math.ceil(max(found.lengths) * 1.25 / 64) * 64)


def epochs_for(shards: Sequence[str]) -> Epochs:
    """Return as many epochs as `STEPS` steps take, at most `MAX_EPOCHS`; reads no more samples than these steps."""
    samples = (sample for shard in shards for sample in read_shard(shard) if isinstance(sample, Sample))
    number = sum(1 for _ in islice(samples, STEPS * BATCH_SIZE))
    steps = math.ceil(number / BATCH_SIZE)
    if steps >= STEPS:
        return Epochs(1, f"an epoch has at least {STEPS} steps")
    epochs = min(MAX_EPOCHS, math.ceil(STEPS / max(1, steps)))
    of_one = f"{number:,} samples are {steps} {'step' if steps == 1 else 'steps'} of {BATCH_SIZE}"
    return Epochs(
        epochs, f"{of_one}, and a student needs about {STEPS} to learn anything; {MAX_EPOCHS} at most"
    )


def losses_for(settings: dict[str, Any], found: Measured, *, is_cut: bool) -> Losses:
    """Return the losses that a student can be trained with on a teacher: all of them, or without those of images.

    A student that will be cut from the teacher takes all.
    """
    focus = {"weight": 0.1, "k": max(1, min(16, min(found.vision_tokens, default=64) // 4))}
    every = LOSSES | {"vision_focus": focus}
    if is_cut:
        return Losses(TARGETS, every, "")
    for without in ((), OF_IMAGES):
        losses = {name: loss for name, loss in every.items() if name not in without}
        targets = {name: target for name, target in TARGETS.items() if name == "logits" or not without}
        try:
            with redirect_stderr(io.StringIO()):
                check_student(Config.model_validate(settings | {"targets": targets, "losses": losses}))
        except ConfigError as error:
            note = str(error)
            continue
        return Losses(targets, losses, note if without else "")
    raise ConfigError(note)


def in_words(values: Sequence[int]) -> str:
    """Return smallest, median and largest of some numbers."""
    if not values:
        return "none"
    if min(values) == max(values):
        return str(values[0])
    return f"{min(values)} to {max(values)} (median {median(values):.0f})"


def has_gpu() -> bool:
    """Return whether this machine can compute in bfloat16 on a GPU."""
    return torch.cuda.is_available()
