"""The samples that several stores hold together, and what `on_missing` does with those that one of them lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cache import SampleEntry
from pipeline.distill.join.rows import Row, Rows
from pipeline.distill.join.stores import Source, Stores
from pipeline.errors import ConfigError, JoinError
from pipeline.targets.targets import TARGETS

IsChosen = Callable[[SampleEntry], bool]


@dataclass(frozen=True)
class Missing:
    """Samples that a store lacks and another store holds, or shards that no store has a part of, counted."""

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
    """The rows of a data set, and what its stores lack."""

    rows: Rows
    missing: tuple[Missing, ...]


def join_rows(stores: Stores, shards: Mapping[str, str], is_chosen: IsChosen | None = None) -> Join:
    """Join the stores' samples of the shards (part -> path), part by part, in the order of the shard.

    Raises `ConfigError` for a shard that no store has a part of, and `JoinError` for a sample that a store lacks,
    unless `stores.on_missing` provides for it.
    """
    parts, absent = _parts(stores, shards)
    for store in stores.opened:
        store.check_keys()  # before any fork: the children then share the look-up table
    rows = _union(stores, parts, is_chosen)
    counts = [
        _counted(stores, source, rows[int(lacks.argmax())], (int(lacks.sum()), len(rows)))
        for source, lacks in zip(stores.sources, rows.lacks.T, strict=False)  # a single store has no column
        if lacks.any()
    ]
    if stores.on_missing == "skip":
        rows = rows.where(np.logical_not(rows.lacks.any(axis=1)))
    return Join(rows, (*absent, *counts))


def _parts(stores: Stores, shards: Mapping[str, str]) -> tuple[list[str], tuple[Missing, ...]]:
    """Return the parts to read, in order, and the shards without a part in any store. Raises `ConfigError`."""
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


def _union(stores: Stores, parts: Sequence[str], is_chosen: IsChosen | None) -> Rows:
    """Return every chosen sample of the parts once; the objects of one part's samples are in memory at a time."""
    of_part = _of_the_store if len(stores.opened) == 1 else _of_any_store
    numbers = {part: number for number, part in enumerate(parts)}
    places = [np.empty((0, 3), dtype=np.uint32)]
    lacks = [np.empty((0, 0 if len(stores.opened) == 1 else len(stores.opened)), dtype=np.bool_)]
    for part in parts:
        found = list(of_part(stores, part, numbers, is_chosen))
        places.append(np.array([place for place, _ in found], dtype=np.uint32).reshape(-1, 3))
        absent = np.array([absent for _, absent in found], dtype=np.bool_)
        lacks.append(absent.reshape(len(found), lacks[0].shape[1]))
    return Rows(stores.opened, parts, np.concatenate(places), np.concatenate(lacks))


def _of_the_store(
    stores: Stores, part: str, numbers: Mapping[str, int], is_chosen: IsChosen | None
) -> Iterator[tuple[tuple[int, int, int], list[bool]]]:
    [store] = stores.opened
    for sample in range(store.num_samples(part)):
        if is_chosen is None or is_chosen(store.entry(part, sample)):
            yield (0, numbers[part], sample), []


def _of_any_store(
    stores: Stores, part: str, numbers: Mapping[str, int], is_chosen: IsChosen | None
) -> Iterator[tuple[tuple[int, int, int], list[bool]]]:
    """Yield where the samples of a part lie, and which stores lack each; samples of an earlier part are left out.

    The order is that of the shard: stores that were made from one shard agree on where in it a sample lies.
    """
    having = [(number, store) for number, store in enumerate(stores.opened) if part in store.parts]
    entries = [(number, *of_one) for number, store in having for of_one in enumerate(store.entries(part))]
    if len(having) > 1:
        entries.sort(key=lambda of_one: of_one[2].json_span.offset)
    found = [store.find([entry.key for _, _, entry in entries]) for store in stores.opened]
    seen: set[str] = set()
    for (number, sample, entry), *places in zip(entries, *found, strict=True):
        before = (numbers.get(place[0], numbers[part]) < numbers[part] for place in places if place)
        if entry.key in seen or any(before):
            continue
        seen.add(entry.key)
        if is_chosen is None or is_chosen(entry):
            yield (number, numbers[part], sample), [place is None for place in places]


def _counted(stores: Stores, source: Source, first: Row, counts: tuple[int, int]) -> Missing:
    """Return what a store lacks. Raises `JoinError` or `ConfigError` where `on_missing` does not provide for it.

    `first` is the first sample that it lacks; `counts` are how many it lacks, and how many there are.
    """
    (part, entry), (num_lacked, num_samples) = first, counts
    whole = [name for name in source.targets if not TARGETS[name].can_be_recomputed()]
    if stores.on_missing == "raise":
        raise JoinError(
            f"sample {entry.key!r} is not in {source.store.path} ({_why(source, part, entry.key)}), which gives "
            f"{' and '.join(source.targets)}, but in another store; {num_lacked:,} of {num_samples:,} samples are "
            "missing there: cache them with `alignkd teacher-cache`, or set on_missing: skip"
            f"{'' if whole else ' or recompute'}"
        )
    if stores.on_missing == "recompute" and whole:
        raise ConfigError(
            f"on_missing: recompute cannot give {whole[0]!r}, which needs the whole teacher; sample "
            f"{entry.key!r} is not in {source.store.path} ({_why(source, part, entry.key)}), nor are "
            f"{num_lacked - 1:,} others: cache them with `alignkd teacher-cache`, or set on_missing: skip"
        )
    return Missing(str(source.store.path), source.targets, "samples", num_lacked, num_samples, entry.key)


def _why(source: Source, part: str, key: str) -> str:
    if part not in source.store.parts:
        return f"its part {part} is not finished there"
    reason = dict(source.store.rejects(part)).get(key)
    return f"part {part} knows no such key" if reason is None else f"rejected there: {reason}"
