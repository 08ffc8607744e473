"""What a student's weights depend on: kept with a training, and compared, key by key, with what is asked now."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache import digest_of
from pipeline.config import Config
from pipeline.dataset import JoinedDataset
from pipeline.models.checkpoint import Checkpoint
from pipeline.stores import TOKENS
from pipeline.training_arguments import HOW_IT_RUNS, OF_THE_LOG

NOT_SET = object()
DIGEST = re.compile(r"[0-9a-f]{64}")
SHOWN = 100  # characters of a value in a message

# Schedules whose learning rate at a step does not depend on how many steps there are.
OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True)
class Change:
    """A key whose value was another one."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True)
class RunIdentity:
    """All that weights depend on but the samples of a step, which a run under way may change.

    `digest` is of settings, fingerprints and first weights; `made_of` is those by name, and what the stores hold.
    """

    digest: str
    made_of: Mapping[str, Any]

    @classmethod
    def of(cls, config: Config, dataset: JoinedDataset) -> RunIdentity:
        read = {"cache"} if config.caches is None else {"caches", "on_missing"}
        settings = config.model_dump(
            mode="json", include={"student", "data", "targets", "losses", "train"} | read
        )
        for cache in settings.get("caches") or [settings["cache"]]:
            del cache["mirror"], cache["mirror_bytes"]  # where bytes are kept changes none of them
        left_out = OF_THE_LOG + HOW_IT_RUNS
        settings["train"] = {name: value for name, value in settings["train"].items() if name not in left_out}
        fingerprints = [store.manifest.fingerprint.to_json() for store in dataset.stores.opened]
        stored: Any = fingerprints[0]
        made_of = settings | (
            {"store": fingerprints[0]} if config.caches is None else {"stores": fingerprints}
        )
        if config.caches is not None:  # of several teachers the config's is the stub's
            stub = config.teacher.model if config.targets.recomputed() else None
            missing = [missing.count for missing in dataset.missing]
            stored = [fingerprints, missing, stub]
            made_of |= {"missing": missing, "teacher": {"model": stub}}
        first_weights = Checkpoint(config.student.model).digest()
        samples = {"number": len(dataset), "contents": _contents(dataset)}
        made_of |= {"samples": samples, "first weights": first_weights}
        digest = digest_of([settings, stored, len(dataset), first_weights])
        return cls(digest, json.loads(json.dumps(made_of)))

    def changes(self, mark: Mapping[str, Any]) -> list[Change]:
        """What differs from the training whose mark this is; of marks that list nothing, that something does."""
        if isinstance(mark.get("made_of"), dict):
            return list(_changes(mark["made_of"], self.made_of))
        known = mark.get("identity") == self.digest
        return [] if known else [Change("settings, data or first weights", "others", "these")]

    def may_lengthen(self, mark: Mapping[str, Any]) -> bool:
        """Whether this is the same run with more steps, and none of those made would have been another one."""
        changes = self.changes(mark)
        return not changes or (is_longer(changes) and self.has_open_schedule())

    def has_open_schedule(self) -> bool:
        train = self.made_of["train"]
        warm_up_is_a_share = 0 < (train.get("warmup_steps") or 0) < 1
        return self.schedule() in OPEN_SCHEDULES and not warm_up_is_a_share

    def schedule(self) -> str:
        return self.made_of["train"].get("lr_scheduler_type", "linear")


def is_longer(changes: Sequence[Change]) -> bool:
    """Whether all that changed is that `max_steps`, or else the number of epochs, was raised."""
    if len(changes) != 1 or changes[0].key not in ("train.max_steps", "train.num_train_epochs"):
        return False
    default = -1 if changes[0].key == "train.max_steps" else 3.0  # transformers' own
    old, new = (default if value is NOT_SET else value for value in (changes[0].old, changes[0].new))
    return 0 < old < new  # -1 steps: the epochs say how many


def _changes(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _changes(
                old.get(name, NOT_SET), new.get(name, NOT_SET), f"{key}.{name}" if key else name
            )
    elif isinstance(old, list) and isinstance(new, list) and _are_records(old, new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(one, other, f"{key}[{number}]")
    elif old != new:
        yield Change(key, old, new)


def _are_records(old: list[Any], new: list[Any]) -> bool:
    return len(old) == len(new) and all(isinstance(entry, dict) for entry in [*old, *new])


def _shown(value: Any) -> str:
    if value is NOT_SET:
        return "not set"
    if isinstance(value, str):
        return value[:12] if DIGEST.fullmatch(value) else value[:SHOWN]
    return json.dumps(value)[:SHOWN]


def _contents(dataset: JoinedDataset) -> str:
    """Of the samples that the stores hold of the shards; not of teachers' numbers, which a repair may round anew."""
    return digest_of([
        {part: store.contents(part, TOKENS) for part in store.parts if part in dataset.shards}
        for store in dataset.stores.opened
    ])  # fmt: skip
