"""Which samples a data set has when its stores do not hold the same, and what becomes of those that a store lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cache import SampleEntry
from pipeline.errors import ConfigError, JoinError
from pipeline.stores import Source, Stores
from pipeline.targets import TARGETS

Row = tuple[str, SampleEntry]  # a part, and one of its samples


@dataclass(frozen=True)
class Missing:
    """How many samples a store lacks of those that some store holds, or how many shards none has a part of."""

    store: str
    targets: tuple[str, ...]
    what: str
    count: int
    of: int
    first: str

    def __str__(self) -> str:
        given = " and ".join(self.targets) or "no target"
        return f"{self.count:,} of {self.of:,} {self.what} are not in {self.store} ({given}), first {self.first!r}"


@dataclass(frozen=True)
class Join:
    """The rows of a data set, and what its stores lack.

    `lacking`: by a sample's key the targets that no store gave, to be made again beside the student.
    """

    rows: Sequence[Row]
    missing: tuple[Missing, ...]
    lacking: Mapping[str, frozenset[str]]


def join_rows(stores: Stores, shards: Mapping[str, str], is_chosen: Callable[[SampleEntry], bool]) -> Join:
    """The samples that any store holds of the shards (part -> path), as far as `stores.on_missing` lets them stay.

    Part by part, in the order of the shard. Raises `ConfigError` for a shard that no store has a part of, and
    `JoinError` for a sample that a store lacks which has to give some of its targets, unless that is provided for.
    """
    parts, absent = _parts(stores, shards)
    rows = [row for row in _union(stores, parts) if is_chosen(row[1])]
    if len(stores.sources) == 1:
        return Join(rows, absent, {})
    lacks = {
        entry.key: without
        for _, entry in rows
        if (without := [source for source in stores.sources if entry.key not in source.store])
    }
    counts = [
        _counted(stores, source, theirs, len(rows))
        for source in stores.sources
        if (theirs := [row for row in rows if source in lacks.get(row[1].key, ())])
    ]
    if stores.on_missing == "skip":
        return Join([row for row in rows if row[1].key not in lacks], (*absent, *counts), {})
    lacking = {
        key: frozenset(target for source in without for target in source.targets)
        for key, without in lacks.items()
    }
    return Join(rows, (*absent, *counts), lacking)


def _parts(stores: Stores, shards: Mapping[str, str]) -> tuple[list[str], tuple[Missing, ...]]:
    """The parts to read, in order, and the shards that have none in any store: skipped, or `ConfigError`."""
    known = {part for store in stores.opened for part in store.parts}
    if not (absent := sorted(shards.keys() - known)):
        return sorted(shards), ()
    if stores.on_missing != "skip":
        single = len(stores.opened) == 1
        raise ConfigError(
            f"{stores if single else f'each of {stores}'} has no finished part for {len(absent)} of {len(shards)} "
            f"shards, first {absent[0]!r}; run `alignkd teacher-cache` with "
            f"{'this config' if single else 'the config of one of them, or set on_missing: skip'}"
        )
    targets = tuple(target for source in stores.sources for target in source.targets)
    missing = Missing(str(stores), targets, "shards", len(absent), len(shards), absent[0])
    return sorted(shards.keys() & known), (missing,)


def _union(stores: Stores, parts: Sequence[str]) -> list[Row]:
    """Every sample of the parts once. Stores that were made of one shard agree on where in it a sample lies."""
    rows: dict[str, Row] = {}
    finished = [(store, set(store.parts)) for store in stores.opened]
    for part in parts:
        having = [store for store, names in finished if part in names]
        entries = [entry for store in having for entry in store.entries(part)]
        if len(having) > 1:
            entries.sort(key=lambda entry: entry.json_span.offset)
        for entry in entries:
            rows.setdefault(entry.key, (part, entry))
    return list(rows.values())


def _counted(stores: Stores, source: Source, lacked: Sequence[Row], num_samples: int) -> Missing:
    """What a store lacks, told; `JoinError` or `ConfigError` where `on_missing` is no answer to it."""
    part, entry = lacked[0]
    whole = [name for name in source.targets if "source" not in TARGETS[name].settings.model_fields]
    if stores.on_missing == "raise":
        raise JoinError(
            f"sample {entry.key!r} is not in {source.store.path} ({_why(source, part, entry.key)}), which gives "
            f"{' and '.join(source.targets)}, but in another store; {len(lacked):,} of {num_samples:,} samples are "
            "missing there: cache them with `alignkd teacher-cache`, or set on_missing: skip"
            f"{'' if whole else ' or recompute'}"
        )
    if stores.on_missing == "recompute" and whole:
        raise ConfigError(
            f"on_missing: recompute cannot make {whole[0]!r} again, which needs the whole teacher; sample "
            f"{entry.key!r} is not in {source.store.path} ({_why(source, part, entry.key)}), nor are "
            f"{len(lacked) - 1:,} others: cache them with `alignkd teacher-cache`, or set on_missing: skip"
        )
    return Missing(str(source.store.path), source.targets, "samples", len(lacked), num_samples, entry.key)


def _why(source: Source, part: str, key: str) -> str:
    if part not in source.store.parts:
        return f"its part {part} is not finished there"
    reason = dict(source.store.rejects(part)).get(key)
    return f"part {part} knows no such key" if reason is None else f"rejected there: {reason}"
