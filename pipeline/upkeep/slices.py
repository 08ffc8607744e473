"""Which parts and arrays of a store a smaller one keeps, and what its manifest then says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cache import Manifest, Store, digest_of, slice_store
from pipeline.errors import ConfigError
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS


def copy_store(
    source: Store,
    output: Path,
    *,
    targets: str | None = None,
    parts: str | None = None,
    fraction: float = 1.0,
) -> Store:
    """A new store with the targets and parts named, comma between them, of one that may be behind a URL."""
    names = chosen_parts(source, parts.split(",") if parts else None, fraction)
    kept = targets.split(",") if targets else None
    with tqdm(total=len(names), unit="part", desc=f"copy {source.path}", file=sys.stderr) as progress:
        return slice_store(
            source,
            output,
            manifest=manifest_with(source, kept),
            parts=names,
            each=lambda part: progress.update(),
        )


def described(store: Store) -> str:
    """A store in one line."""
    return (
        f"{store.path}: {len(store.parts)} parts, {len(store):,} samples, {', '.join(store.manifest.specs)}"
    )


def chosen_parts(store: Store, names: Sequence[str] | None, fraction: float) -> list[str]:
    """The parts named, or all; of these a share, evenly chosen, at least one."""
    parts = list(store.parts if names is None else names)
    count = max(1, round(fraction * len(parts)))
    return [parts[number * len(parts) // count] for number in range(min(count, len(parts)))]


def manifest_with(store: Store, targets: Sequence[str] | None) -> Manifest:
    """The manifest of the store with these targets alone: its fingerprint is that of a config which asks for them.

    Raises `ConfigError` for a target that the store does not hold.
    """
    stored = store.manifest
    if targets is None:
        return stored
    captured = stored.capture["targets"]
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
    """Names of the arrays that captured targets fill."""
    facts = TeacherFacts.of(store.manifest)
    targets = [TARGETS[name].model_validate(settings) for name, settings in captured.items()]
    return {spec.name for target in targets for spec in target.arrays(facts)}
