"""The stores that stage 2 reads: which targets each gives, and whether it is what the config would have cached."""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from cache import (
    Difference,
    Fingerprint,
    FingerprintMismatch,
    Manifest,
    Mirror,
    SampleEntry,
    Store,
    digest_of,
)
from pipeline.config.cache_settings import CacheConfig, CachesConfig, OnMissing
from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample
from pipeline.data.pairing import free_between_families, targets_read
from pipeline.data.preparation import Preparation, capture_settings
from pipeline.distill.join.stored_tokens import TOKENS, pop_tokens
from pipeline.errors import ConfigError, JoinError
from pipeline.losses.losses import LOSSES
from pipeline.targets.target import Arrays, Target, TeacherFacts

REMEDY = (
    "set the config to what the store was made with (`alignkd info` shows it), or set cache.path to a new "
    "store and run `alignkd teacher-cache`; where a field cannot matter, --allow-mismatch FIELD lets it differ"
)
REMEDY_OF_SEVERAL = (
    "set the config to what the store was made with (`alignkd info` shows it), or name another store; where a field "
    "cannot matter, allow_mismatch: [FIELD] of its entry of `caches` lets it differ"
)


@dataclass(frozen=True)
class Source:
    """A store and the targets that are taken from it; `place` is the section of the config that names it."""

    store: Store
    targets: tuple[str, ...]
    place: str = "cache"

    @property
    def facts(self) -> TeacherFacts:
        return TeacherFacts.of(self.store.manifest)

    def arrays(self, targets: Mapping[str, Target]) -> list[str]:
        """Return the names of the arrays that it gives of `targets`."""
        given = [target for name, target in targets.items() if name in self.targets]
        return [spec.name for target in given for spec in target.arrays(self.facts)]


@dataclass(frozen=True)
class Stores:
    """One store, or several joined by key, with each target from one of them. Picklable.

    `allowed` are the differences that the config allows, each with the path of its store.
    """

    sources: tuple[Source, ...]
    on_missing: OnMissing = "raise"
    allowed: tuple[tuple[str, Difference], ...] = ()

    @classmethod
    def single(cls, store: Store, targets: Mapping[str, Any]) -> Stores:
        """Wrap one store that gives all the targets."""
        return cls((Source(store, tuple(targets)),))

    def __str__(self) -> str:
        return " and ".join(str(store.path) for store in self.opened)

    @property
    def opened(self) -> tuple[Store, ...]:
        return tuple(source.store for source in self.sources)

    @property
    def read_alike(self) -> bool:
        """Whether the student reads text and images as the teachers did, by the fingerprints of the stores."""
        reading = ("tokenizer", "template", "image_preprocessing")
        return not any(difference.field in reading for _, difference in self.allowed)

    def giving(self, target: str) -> Source:
        """Return the source of a target; the first one for a target that none gives."""
        return next((source for source in self.sources if target in source.targets), self.sources[0])

    def facts(self) -> dict[str, TeacherFacts]:
        """Return, for each target that a store gives, the facts of the teacher it comes from."""
        return {target: source.facts for source in self.sources for target in source.targets}

    def read_many(
        self, keys: Sequence[str], names: Sequence[Sequence[str]]
    ) -> Iterator[tuple[TokenizedSample, Arrays]]:
        """Yield for each key the tokens and the arrays named for each source, from the sources that hold the sample.

        All keys are asked for at once. Raises `JoinError` if two stores differ in a sample's tokens or images.
        """
        found = [source.store.find(keys) for source in self.sources]
        streams = [
            source.store.read_many(list(compress(keys, places)), [*TOKENS, *wanted])
            for source, places, wanted in zip(self.sources, found, names, strict=True)
        ]
        for key, *places in zip(keys, *found, strict=True):
            first, *others = [
                Stored.of(source.store, source.store.entry(*place), next(stream))
                for source, place, stream in zip(self.sources, places, streams, strict=True)
                if place
            ]
            for other in others:
                _check_same_sample(key, first, other)
            yield first.tokens, dict(ChainMap(first.arrays, *(other.arrays for other in others)))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the path, targets and fingerprint of each store, for provenance.json."""
        return [
            {
                "path": str(source.store.path),
                "targets": list(source.targets),
                "fingerprint": source.store.manifest.fingerprint.to_json(),
            }
            for source in self.sources
        ]


def open_store(cache: CacheConfig) -> Store:
    """Open one store, read-only; one behind a URL through the config's mirror, if it has one."""
    kept = Mirror(Path(cache.mirror).expanduser(), cache.mirror_bytes) if cache.mirror else None
    return Store(cache.path, mirror=kept)


def open_stores(config: Config, preparation: Preparation) -> Stores:
    """Open the config's stores.

    Raises `FingerprintMismatch` if a store is not what the config would have cached in it, `ConfigError` if it is not
    clear which store gives what, or if a loss reads what none gives.
    """
    caches = config.all_caches()
    sources = _sources(config, [open_store(cache) for cache in caches])
    allowed = [
        (str(source.store.path), difference)
        for source, cache in zip(sources, caches, strict=True)
        for difference in check_fingerprint(source, cache, config, preparation)
    ]
    return Stores(tuple(sources), config.on_missing, tuple(allowed))


def check_fingerprint(
    source: Source, cache: CacheConfig, config: Config, preparation: Preparation
) -> list[Difference]:
    """Compare, field by field, what a store holds with what the config asks. Raises `FingerprintMismatch`.

    Fields of the store's `allow_mismatch` may differ: they are reported on stderr and returned. Only the targets that
    are taken from it and that a loss reads are compared: it may hold others.
    """
    read = targets_read(config).intersection(source.targets)
    stored = _with_targets(source.store.manifest, read)
    # The teacher, its family and its dtype were stage 1's choice: stage 2 has no other to compare with.
    capture = capture_settings(config, dtype=str(stored.capture.get("dtype")))
    capture["targets"] = _only(capture, read)
    mine = Fingerprint(
        teacher=stored.fingerprint.teacher,
        family=stored.fingerprint.family,
        capture=digest_of(capture),
        **preparation.digests(),
    )
    differences = stored.differences(replace(stored, fingerprint=mine, capture=capture))
    free = {*cache.allow_mismatch, *free_between_families(source.facts.family, preparation.family, read)}
    if refused := [d for d in differences if d.field not in free]:
        remedy = REMEDY if config.caches is None else REMEDY_OF_SEVERAL
        raise FingerprintMismatch(source.store.path, refused, remedy=remedy)
    for d in differences:
        print(f"{source.place}.allow_mismatch (stored -> mine): {d}", file=sys.stderr)
    return differences


def _with_targets(stored: Manifest, names: Collection[str]) -> Manifest:
    """Return the manifest that the store would have if stage 1 had captured these targets alone."""
    if digest_of(stored.capture) != stored.fingerprint.capture:
        return stored  # its settings are not those of its fingerprint: nothing can be said of a part of them
    capture = stored.capture | {"targets": _only(stored.capture, names)}
    return replace(
        stored, capture=capture, fingerprint=replace(stored.fingerprint, capture=digest_of(capture))
    )


def _only(capture: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: settings for name, settings in capture.get("targets", {}).items() if name in names}


def _sources(config: Config, stores: Sequence[Store]) -> list[Source]:
    """Return each store with the targets that are taken from it. Raises `ConfigError`."""
    wanted = config.targets.cached()
    if config.caches is None:
        return [Source(stores[0], tuple(wanted))]
    sources = []
    for number, (store, given) in enumerate(zip(stores, _given(config.caches, stores), strict=True)):
        if not (taken := tuple(name for name in wanted if name in given)):
            raise ConfigError(
                f"caches.{number}: {store.path} has nothing to give: it holds {', '.join(_held(store)) or 'none'}, "
                f"the config reads {', '.join(wanted) or 'none'}, and what other entries give is theirs; leave it out"
            )
        sources.append(Source(store, taken, f"caches.{number}"))
    gives = {target for source in sources for target in source.targets}
    for asks, target in _asked(config):
        if target in wanted and target not in gives:
            listed = ", ".join(
                f"{source.store.path} gives {' and '.join(source.targets)}" for source in sources
            )
            raise ConfigError(
                f"{asks} needs the target {target!r}, which no store of `caches` gives: {listed}; add a store that "
                f"holds it, or {'remove the loss' if asks.startswith('losses') else 'store it'}"
            )
    return sources


def _asked(config: Config) -> Iterator[tuple[str, str]]:
    """Yield which section of the config reads which target."""
    yield from (
        (f"losses.{name}", target) for name in config.losses.active() for target in LOSSES[name].targets
    )
    if config.twig is not None:
        yield "twig", "hidden_states"


def _given(caches: Sequence[CachesConfig], stores: Sequence[Store]) -> list[set[str]]:
    """Return the targets each store may give: those its entry names, else all that no other names or gave before."""
    named = {target for cache in caches for target in cache.targets or ()}
    given: list[set[str]] = []
    for number, (cache, store) in enumerate(zip(caches, stores, strict=True)):
        held = _held(store)
        if absent := [target for target in cache.targets or () if target not in held]:
            raise ConfigError(
                f"caches.{number}.targets names {absent[0]!r}, but {store.path} holds {', '.join(held) or 'none'}; "
                "name one of these, or another store"
            )
        given.append(set(cache.targets or set(held) - named.union(*given)))
    return given


def _held(store: Store) -> list[str]:
    return list(store.manifest.capture.get("targets", {}))


@dataclass(frozen=True)
class Stored:
    """What one store holds of a sample."""

    store: Store
    tokens: TokenizedSample
    arrays: Arrays
    images: tuple[str, ...]

    @classmethod
    def of(cls, store: Store, entry: SampleEntry, arrays: Arrays) -> Stored:
        """Wrap what a store returned of a sample; its tokens are taken out of `arrays`."""
        return cls(store, pop_tokens(arrays, entry, store.manifest), arrays, entry.images)


def _check_same_sample(key: str, mine: Stored, theirs: Stored) -> None:
    """Raise `JoinError` unless two stores hold the same tokens and images under a key."""
    for what, one, other in (
        ("token ids", mine.tokens.input_ids, theirs.tokens.input_ids),
        ("labels", mine.tokens.labels, theirs.tokens.labels),
        ("images", mine.images, theirs.images),
        ("numbers of vision tokens", mine.tokens.sizes, theirs.tokens.sizes),
    ):
        if one != other:
            raise JoinError(
                f"sample {key!r}: its {what} in {theirs.store.path} are not those in {mine.store.path} "
                f"({first_difference(other, one, ('there', 'here'))}); "
                "the stores were cached from different data: cache one of them again, or leave it out of `caches`"
            )


def first_difference(
    theirs: Sequence[Any], mine: Sequence[Any], names: tuple[str, str] = ("store", "mine")
) -> str:
    """Describe the first position where two sequences differ, or their lengths if one continues the other."""
    for position, (a, b) in enumerate(zip(theirs, mine, strict=False)):
        if a != b:
            return f"at position {position}: {names[0]} {str(a)[:16]}, {names[1]} {str(b)[:16]}"
    return f"{names[0]} has {len(theirs)}, {names[1]} {len(mine)}"
