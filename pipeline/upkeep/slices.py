"""Copy a part of a store: some of its parts and targets, with the manifest that fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cache import Manifest, Store, digest_of, slice_store
from pipeline.errors import ConfigError
from pipeline.progress import Progress
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS

T = TypeVar("T")


def copy_store(
    source: Store,
    output: Path,
    *,
    targets: str | None = None,
    parts: str | None = None,
    fraction: float = 1.0,
) -> Store:
    """Copy a store, which may be behind a URL: the targets and parts named (comma-separated) or all.

    Of the parts a fraction is taken, evenly chosen, at least one.
    """
    names = parts.split(",") if parts else source.parts
    names = evenly(names, max(1, round(fraction * len(names))))
    manifest = manifest_with(source, targets.split(",") if targets else None)
    with Progress(f"copy {source.path}", unit="parts", doing="looking for what is lacking") as progress:
        return slice_store(source, output, manifest=manifest, parts=names, progress=progress)


def described(store: Store) -> str:
    """Return a store in one line."""
    return (
        f"{store.path}: {len(store.parts)} parts, {len(store):,} samples, {', '.join(store.manifest.specs)}"
    )


def evenly(things: Sequence[T], count: int) -> list[T]:
    """Return `count` of the things (at most all), evenly spread."""
    count = min(count, len(things))
    return [things[number * len(things) // count] for number in range(count)]


def manifest_with(store: Store, targets: Sequence[str] | None) -> Manifest:
    """Return the store's manifest with these targets alone: its fingerprint is that of a config with only these.

    Raises `ConfigError` for a target that the store does not hold.
    """
    stored = store.manifest
    if targets is None:
        return stored
    if (captured := stored.capture.get("targets")) is None:
        raise ConfigError(
            f"--targets: the manifest of {store.path} does not say which array is of which target, as that of a "
            "store of stage 1 does; copy it without --targets"
        )
    if unknown := [name for name in targets if name not in captured]:
        raise ConfigError(f"--targets: {store.path} holds no {unknown[0]!r}; it holds {', '.join(captured)}")
    kept = {name: captured[name] for name in captured if name in targets}
    dropped = _arrays(store, captured) - _arrays(store, kept)
    capture = {**stored.capture, "targets": kept}
    return replace(
        stored,
        arrays=tuple(spec for spec in stored.arrays if spec.name not in dropped),
        capture=capture,
        fingerprint=replace(stored.fingerprint, capture=digest_of(capture)),
    )


def _arrays(store: Store, captured: Mapping[str, Any]) -> set[str]:
    """Names of the arrays of captured targets."""
    facts = TeacherFacts.of(store.manifest)
    targets = [TARGETS[name].model_validate(settings) for name, settings in captured.items()]
    return {spec.name for target in targets for spec in target.arrays(facts)}
