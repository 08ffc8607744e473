"""The check that student and teacher fit together, made before stage 1 spends hours on it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation
from pipeline.errors import ConfigError
from pipeline.losses.losses import LOSSES
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder, small_files
from pipeline.models.teacher_plan import facts_of_config
from pipeline.targets.target import TeacherFacts

COMPARED_SIZES = ((640, 480), (300, 900))  # of images, in pixels


def check_student(config: Config) -> None:
    """Raise `ConfigError` for a student that stage 2 would refuse; opens no weights.

    Prints to stderr a student that is not on this machine, and the fields of the fingerprint in which it differs
    from the teacher: both may be intended.
    """
    teacher = checkpoint_folder(config.teacher.model)
    folder = small_files(config.student.model)
    if folder is None:
        _note(config, "is not on this machine; it is not checked before stage 2")
        return
    shape = read_config(folder)
    check_pair(
        config, shape, facts_of_config(config.teacher.model, read_config(teacher)), of=config.teacher.model
    )
    theirs, mine = (load_preparation(str(place), config.data) for place in (teacher, folder))
    _check_vision_tokens(config, theirs, mine)
    asked, given = theirs.digests(), mine.digests()
    allowed = {field for cache in config.all_caches() for field in cache.allow_mismatch}
    allowed |= free_between_families(theirs.family, mine.family, targets_read(config))
    if differing := [name for name, digest in asked.items() if digest != given[name] and name not in allowed]:
        _note(
            config,
            f"has another {' and '.join(differing)} than the teacher; stage 2 refuses a store for that",
        )


def targets_read(config: Config) -> set[str]:
    """Return the names of the targets that the configured losses read, and those that a twig continues."""
    read = {target for name in config.losses.active() for target in LOSSES[name].targets}
    return read if config.twig is None else read | {"hidden_states"}


def free_between_families(teacher: str, student: str, targets: Collection[str]) -> set[str]:
    """Return the fields of the fingerprint that may differ because the two are of different families.

    Their towers read pixels in their own ways: the numbers of vision tokens must agree, sample by sample. Vision
    features alone do not depend on the text either.
    """
    if teacher == student:
        return set()
    return {"image_preprocessing"} | ({"tokenizer", "template"} if set(targets) <= {"vision"} else set())


def _check_vision_tokens(config: Config, teacher: Preparation, student: Preparation) -> None:
    """Raise `ConfigError` if a loss compares images token by token, and an image has other numbers of them."""
    compared = [name for name in config.losses.active() if {"attention", "vision"} & {*LOSSES[name].targets}]
    for size in COMPARED_SIZES if compared else ():
        theirs, mine = teacher.vision_tokens(size), student.vision_tokens(size)
        if theirs != mine:
            raise ConfigError(
                f"losses.{compared[0]} compares images token by token, but one of {size[0]} x {size[1]} pixels has "
                f"{theirs} vision tokens in the teacher and {mine} in student.model {config.student.model}; remove "
                f"{' and '.join(f'losses.{name}' for name in compared)}, or use a student that sees images as the "
                "teacher does"
            )


def _note(config: Config, what: str) -> None:
    print(f"student.model {config.student.model} {what}", file=sys.stderr)


def check_pair(config: Config, shape: Any, facts: TeacherFacts, *, of: object) -> None:
    """Raise `ConfigError` if a student of this shape cannot be trained against the teacher `of` these facts.

    How many vision tokens an image has is compared here only where it is always the same; else sample by sample.
    """
    mine = facts_of_config(config.student.model, shape)
    read = targets_read(config)
    if facts.family != mine.family and "logits" in read:
        raise ConfigError(
            f"losses.logits compares token by token, but student.model {config.student.model} is of the family "
            f"{mine.family!r} and the teacher of {of} of {facts.family!r}; remove the loss, or use a student of the "
            "teacher's family"
        )
    compared = ["vocab_size"] if facts.family == mine.family else []
    if None not in (facts.num_vision_tokens, mine.num_vision_tokens) and read != {"logits"}:
        compared.insert(0, "num_vision_tokens")
    for field in compared:
        theirs, ours = getattr(facts, field), getattr(mine, field)
        if theirs != ours:
            raise ConfigError(
                f"student.model {config.student.model}: {field} is {ours}, the teacher of {of} has "
                f"{theirs}; Align-KD needs them equal: use a student of the teacher's family"
            )
    attention, focus = (config.losses.active().get(name) for name in ("attention", "vision_focus"))
    deepest = max((layer for _, layer in attention.layers), default=0) if attention else 0
    if deepest >= mine.num_layers:
        raise ConfigError(
            f"losses.attention.layers asks for the student's layer {deepest}, but {config.student.model} has "
            f"layers 0 to {mine.num_layers - 1}; pair the teacher's layers with these"
        )
    if focus and facts.num_vision_tokens is not None and focus.k > facts.num_vision_tokens:
        raise ConfigError(
            f"losses.vision_focus.k is {focus.k}, but an image has {facts.num_vision_tokens} vision tokens; set it "
            "lower, or use the loss `vision_all`, which compares all of them"
        )
