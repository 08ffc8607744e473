"""The check that student and teacher fit together, made before stage 1 spends hours on it."""

from __future__ import annotations

import sys

from pipeline.config.config import Config
from pipeline.data.preparation import Preparation
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import checkpoint_folder, small_files
from pipeline.models.configuration import MobileVLMConfig, read_config
from pipeline.models.teacher_plan import facts_of_config
from pipeline.targets.target import TeacherFacts


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
    facts = facts_of_config(config.teacher.model, read_config(teacher))
    check_pair(config, read_config(folder), facts, of=config.teacher.model)
    asked, given = (Preparation.of(str(place), config.data).digests() for place in (teacher, folder))
    allowed = {field for cache in config.all_caches() for field in cache.allow_mismatch}
    if differing := [name for name, digest in asked.items() if digest != given[name] and name not in allowed]:
        _note(
            config,
            f"has another {' and '.join(differing)} than the teacher; stage 2 refuses a store for that",
        )


def _note(config: Config, what: str) -> None:
    print(f"student.model {config.student.model} {what}", file=sys.stderr)


def check_pair(config: Config, shape: MobileVLMConfig, facts: TeacherFacts, *, of: object) -> None:
    """Raise `ConfigError` if a student of this shape cannot be trained against the teacher `of` these facts."""
    for field, theirs, mine in (
        ("num_vision_tokens", facts.num_vision_tokens, shape.num_vision_tokens),
        ("vocab_size", facts.vocab_size, shape.vocab_size),
    ):
        if theirs != mine:
            raise ConfigError(
                f"student.model {config.student.model}: {field} is {mine}, the teacher of {of} has "
                f"{theirs}; Align-KD needs them equal: use a student of the teacher's family"
            )
    attention, focus = (config.losses.active().get(name) for name in ("attention", "vision_focus"))
    deepest = max((layer for _, layer in attention.layers), default=0) if attention else 0
    if deepest >= shape.num_hidden_layers:
        raise ConfigError(
            f"losses.attention.layers asks for the student's layer {deepest}, but {config.student.model} has "
            f"layers 0 to {shape.num_hidden_layers - 1}; pair the teacher's layers with these"
        )
    if focus and focus.k > facts.num_vision_tokens:
        raise ConfigError(
            f"losses.vision_focus.k is {focus.k}, but an image has {facts.num_vision_tokens} vision tokens; set it "
            "lower, or use the loss `vision_all`, which compares all of them"
        )
