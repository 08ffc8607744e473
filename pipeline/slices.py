"""Which parts and arrays of a store a smaller one keeps, and what its manifest then says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cache import Manifest, Store, digest_of
from pipeline.dataset import teacher_facts
from pipeline.errors import ConfigError
from pipeline.targets import TARGETS


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
    facts = teacher_facts(store)
    settings = {name: TARGETS[name].settings.model_validate(captured[name]) for name in captured}
    return {spec.name for name in captured for spec in TARGETS[name].arrays(settings[name], facts)}
