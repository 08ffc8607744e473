"""The stores that stage 2 reads: one `cache`, or several `caches` that each give some targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo

from pipeline.settings import LocalPath, Section

MayDiffer = Literal["tokenizer", "template", "image_preprocessing", "capture"]
OnMissing = Literal["raise", "skip", "recompute"]

MIRROR_BYTES = 50_000_000_000


class CacheConfig(Section):
    """The store: stage 1 writes it, stage 2 reads it."""

    path: LocalPath
    """A folder, or for stage 2 also a URL (s3://, gs://, hf://, https://). [stage 1, stage 2; run]"""
    mirror: LocalPath | None = None
    """Folder that keeps what stage 2 reads from a URL; null keeps nothing. [stage 2]"""
    mirror_bytes: int = Field(default=MIRROR_BYTES, ge=1)
    """Largest size of the mirror. [bytes; stage 2]"""
    allow_mismatch: list[MayDiffer] = []
    """Fields of the fingerprint in which the store may differ from the config. Differences are printed and saved in
    provenance.json. [stage 1, stage 2; run]"""


class CachesConfig(CacheConfig):
    """One of several stores, whose samples stage 2 joins by key. Stage 1 writes one store and refuses a list."""

    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Targets that this store gives; null: all that no other entry names and no earlier entry gives.
    [stage 2; run]"""


Caches = Annotated[list[CachesConfig], Field(min_length=1)] | None


def check_one_or_several(cache: Any, info: ValidationInfo) -> Any:
    """Return `cache` unchanged. Raises `ValueError` unless exactly one of `cache` and `caches` is set."""
    if "caches" not in info.data:  # it is invalid itself, and has its own message
        return cache
    if cache is None and info.data["caches"] is None:
        raise ValueError("missing; the config must set it, or `caches` for several stores")
    if cache is not None and info.data["caches"] is not None:
        raise ValueError(
            "set beside `caches`; leave one of them out: `cache` is one store, `caches` are several, each "
            "with its own path and allow_mismatch"
        )
    return cache


def check_named_targets(caches: Caches, cached: Mapping[str, Any]) -> None:
    """Raise `ValueError` if two entries name a target, or one names a target that is not read from a store."""
    named: dict[str, int] = {}
    for number, target in ((n, t) for n, cache in enumerate(caches or ()) for t in cache.targets or ()):
        if target not in cached:
            raise ValueError(
                f"caches.{number}.targets names {target!r}, but `targets` reads from a store "
                f"{', '.join(cached) or 'nothing'}; add `targets.{target}: {{}}`, or leave it out here"
            )
        if target in named:
            raise ValueError(
                f"caches.{number}.targets names {target!r}, as caches.{named[target]}.targets does; one store "
                "gives a target: leave it out of the other"
            )
        named[target] = number
