"""What a student's weights depend on: saved with a training, and compared key by key with the current config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from cache import digest_of
from pipeline.config.config import Config
from pipeline.config.held_out import OF_CHECKPOINTS, OF_HELD_OUT, decides_weights
from pipeline.config.provenance import recorded
from pipeline.config.training_arguments import HOW_IT_RUNS, OF_THE_LOG, samples_per_step
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.join.stores import TOKENS
from pipeline.distill.training.processes import num_processes
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint, checkpoint_folder

NOT_SET = object()
DIGEST = re.compile(r"[0-9a-f]{64}")
SHOWN = 100  # characters of a value in a message

GLOBAL_BATCH = "samples per step (batch size x accumulation x processes)"
STUDENT_SETTINGS = "student's config.json"
HELD_OUT = "held-out samples"
PLACE_IN_A_LIST = re.compile(r"\[\d+\]")
# Keys of paths -> the entries of `made_of` that compare what lies there, so that a moved copy is no change.
CONTENTS_OF_PATHS: dict[str, tuple[str, ...]] = {
    "cache.path": ("store", "samples"),
    "caches.path": ("stores", "samples"),
    "data.shards": ("samples",),
    "data.held_out_shards": ("samples",),
    "student.model": ("first weights", STUDENT_SETTINGS),
}

# Schedules whose learning rate at a step does not depend on how many steps there are.
OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True)
class Change:
    """A key whose value differs."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True)
class RunIdentity:
    """All that a student's weights depend on.

    `digest` is of settings, fingerprints and first weights. `made_of` holds these by name, and what the stores hold.
    `samples_per_step` is the global batch, over all processes and accumulations.
    """

    digest: str
    made_of: Mapping[str, Any]
    samples_per_step: int

    @classmethod
    def of(
        cls,
        config: Config,
        dataset: JoinedDataset,
        held_out: JoinedDataset | None = None,
        *,
        first_weights: str | None = None,
    ) -> RunIdentity:
        """Return the identity of a training; `first_weights` is their digest, by default that of the student's."""
        read = {"cache"} if config.caches is None else {"caches", "on_missing"}
        settings = settings_of_weights(config) | config.model_dump(mode="json", include=read)
        for cache in settings.get("caches") or [settings["cache"]]:
            del cache["mirror"], cache["mirror_bytes"]  # a mirror does not change what is read
        fingerprints = [store.manifest.fingerprint.to_json() for store in dataset.stores.opened]
        stored: Any = fingerprints[0]
        made_of = settings | (
            {"store": fingerprints[0]} if config.caches is None else {"stores": fingerprints}
        )
        if config.caches is not None:  # each store has its own teacher, so the config's is only the stub's
            stub = config.teacher.model if config.targets.recomputed() else None
            missing = [missing.count for missing in dataset.missing]
            stored = [fingerprints, missing, stub]
            made_of |= {"missing": missing, "teacher": {"model": stub}}
        if first_weights is None:
            first_weights = Checkpoint(config.student.model).digest()
        samples = {"number": len(dataset), "contents": _contents(dataset)}
        made_of |= {"samples": samples, "first weights": first_weights}
        made_of[STUDENT_SETTINGS] = _config_digest(checkpoint_folder(config.student.model))
        parts = [settings, stored, len(dataset), first_weights]
        if held_out is not None and decides_weights(config.train):
            made_of |= {HELD_OUT: {"number": len(held_out), "contents": _contents(held_out)}}
            parts.append(made_of[HELD_OUT])
        digest = digest_of(parts)
        return cls(digest, json.loads(json.dumps(made_of)), samples_per_step(config.train, num_processes()))

    def to_json(self) -> dict[str, Any]:
        """Return what a training's mark and its checkpoints keep, for `changes` to compare."""
        return {
            "identity": self.digest,
            "made_of": self.made_of,
            "samples_per_step": self.samples_per_step,
        }

    def changes(self, mark: Mapping[str, Any]) -> list[Change]:
        """Return what differs from the training of a mark; without `made_of` a mark only says that something does."""
        if isinstance(before := mark.get("made_of"), dict):
            changes = [c for c in _changes(before, self.made_of) if not self._is_none(c, before)]
        else:
            is_this = mark.get("identity") == self.digest
            changes = [] if is_this else [Change("settings, data or first weights", "others", "these")]
        if (samples := _samples_per_step(mark)) != self.samples_per_step:
            changes.append(Change(GLOBAL_BATCH, samples, self.samples_per_step))
        return changes

    def _is_none(self, change: Change, before: Mapping[str, Any]) -> bool:
        """Whether two values mean the same: transformers' default written out, or another path of equal content."""
        if change.key == STUDENT_SETTINGS and change.old is NOT_SET:  # a mark of an earlier version
            return True
        contents = CONTENTS_OF_PATHS.get(PLACE_IN_A_LIST.sub("", change.key), ())
        if contents:
            return all(name in before and before[name] == self.made_of.get(name) for name in contents)
        old, new = (_or_default(change.key, value) for value in (change.old, change.new))
        return old is not NOT_SET and old == new

    def may_lengthen(self, mark: Mapping[str, Any]) -> bool:
        """Whether a checkpoint belongs to this run, or to a shorter one whose steps are the first of this run."""
        changes = self.changes(mark)
        return not changes or (is_longer(changes) and self.has_open_schedule())

    def has_open_schedule(self) -> bool:
        """Whether the learning rate of a step does not depend on the number of all steps."""
        warm_up_is_a_share = 0 < (self.made_of["train"].get("warmup_steps") or 0) < 1
        return self.schedule() in OPEN_SCHEDULES and not warm_up_is_a_share

    def schedule(self) -> str:
        return self.made_of["train"].get("lr_scheduler_type", "linear")


def settings_of_weights(config: Config) -> dict[str, Any]:
    """Return the settings that a student's weights depend on, JSON-ready; stores and caches are left out.

    Of `train`, how a run is logged and how its work is cut up do not count, nor when held-out losses are computed,
    unless they decide something.
    """
    settings = recorded(config, "student", "data", "targets", "losses", "train", "twig")
    settings.get("twig", {}).pop("keep", None)  # it is checked, and changes nothing
    for name in ("mirror", "mirror_bytes"):  # a mirror does not change what is read
        settings["data"].pop(name, None)
    left_out = {*OF_THE_LOG, *HOW_IT_RUNS, *OF_HELD_OUT}
    if decides_weights(config.train):
        left_out -= {*OF_HELD_OUT, *OF_CHECKPOINTS}
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in left_out}
    return settings


def is_longer(changes: Sequence[Change]) -> bool:
    """Whether the only change is a larger `max_steps` or number of epochs."""
    if len(changes) != 1 or changes[0].key not in ("train.max_steps", "train.num_train_epochs"):
        return False
    default = -1 if changes[0].key == "train.max_steps" else 3.0  # transformers' own
    old, new = (default if value is NOT_SET else value for value in (changes[0].old, changes[0].new))
    return 0 < old < new  # `max_steps` of -1 leaves the length to the epochs


def _samples_per_step(mark: Mapping[str, Any]) -> Any:
    if (position := mark.get("position")) is None:
        return mark.get("samples_per_step", NOT_SET)
    # A checkpoint of an earlier version, which could change its global batch on the way.
    is_constant = position["samples_seen"] == position["step"] * position["samples_per_step"]
    return position["samples_per_step"] if is_constant else "several"


def _or_default(key: str, value: Any) -> Any:
    """Return a value; transformers' default, if it has one, for a key of `train` that is not set."""
    section, _, name = key.partition(".")
    field = TrainingArguments.__dataclass_fields__.get(name)
    if value is not NOT_SET or section != "train" or field is None:
        return value
    return field.default if field.default_factory is MISSING else field.default_factory()


def _changes(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _changes(old.get(name, NOT_SET), new.get(name, NOT_SET), inner)
    elif _are_records(old) and _are_records(new) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(one, other, f"{key}[{number}]")
    elif old != new:
        yield Change(key, old, new)


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _shown(value: Any) -> str:
    if value is NOT_SET:
        return "not set"
    if isinstance(value, str):
        return value[:12] if DIGEST.fullmatch(value) else value[:SHOWN]
    return json.dumps(value)[:SHOWN]


def _config_digest(folder: Path) -> str:
    read_config(folder)  # raises an error that names what is wrong with the file
    settings = json.loads((folder / "config.json").read_text())
    its_writer = {"_name_or_path", "transformers_version"}
    return digest_of({name: value for name, value in settings.items() if name not in its_writer})


def _contents(dataset: JoinedDataset) -> str:
    """Return a digest of the samples in the stores, without the teacher's numbers: a repair may round these anew."""
    return digest_of([
        {part: store.contents(part, TOKENS) for part in store.parts if part in dataset.shards}
        for store in dataset.stores.opened
    ])  # fmt: skip
