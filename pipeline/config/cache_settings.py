"""The stores that stage 2 reads: one `cache`, or several `caches` that each give some targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo

from pipeline.settings import LocalPath, Section

MayDiffer = Literal["tokenizer", "template", "image_preprocessing", "capture"]
OnMissing = Literal["raise", "skip", "recompute"]


class CacheConfig(Section):
    """A store: a folder, or for stage 2 also a URL (s3://, gs://, hf://, https://).

    What stage 2 reads from a URL it keeps in the folder `mirror`, if one is given, up to `mirror_bytes`. Fields of
    the fingerprint in `allow_mismatch` may differ; differences are logged and saved in provenance.json.
    """

    path: LocalPath
    mirror: LocalPath | None = None
    mirror_bytes: int = Field(default=50_000_000_000, ge=1)
    allow_mismatch: list[MayDiffer] = []


class CachesConfig(CacheConfig):
    """One of several stores, which gives the targets that it names.

    With `targets: null` it gives all of its targets that no other entry names and no earlier entry gives.
    """

    targets: Annotated[list[str], Field(min_length=1)] | None = None


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
