"""Which stores stage 2 reads: one `cache`, or `caches` that each give some targets; what if one lacks a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo

from pipeline.settings import LocalPath, Section

MayDiffer = Literal["tokenizer", "template", "image_preprocessing", "capture"]
OnMissing = Literal["raise", "skip", "recompute"]


class CacheConfig(Section):
    """Where the store is, and which fields of its fingerprint stage 2 lets differ, which is told and recorded.

    Stage 2 also reads a URL: s3://, gs://, hf://, https://. What it reads there it keeps in the folder `mirror`, up
    to `mirror_bytes`, if one is given.
    """

    path: LocalPath
    mirror: LocalPath | None = None
    mirror_bytes: int = Field(default=50_000_000_000, ge=1)
    allow_mismatch: list[MayDiffer] = []


class CachesConfig(CacheConfig):
    """One of several stores. It gives the targets that it names; with `targets: null` all that it holds and no
    other entry names or, earlier in the list, gives.
    """

    targets: Annotated[list[str], Field(min_length=1)] | None = None


Caches = Annotated[list[CachesConfig], Field(min_length=1)] | None


def check_one_or_several(cache: Any, info: ValidationInfo) -> Any:
    """`cache` as it is. ValueError unless one of `cache` and `caches` is set; `caches` were read before."""
    if "caches" in info.data and (cache is None) == (info.data["caches"] is None):
        raise ValueError(
            "missing; the config must set it, or `caches` for several stores"
            if cache is None
            else "set beside `caches`; leave one of them out: `cache` is one store, `caches` are several, each "
            "with its own path and allow_mismatch"
        )
    return cache


def check_named_targets(caches: Caches, cached: Mapping[str, Any]) -> None:
    """ValueError if an entry names a target that the config does not read from a store, or that another names."""
    named: dict[str, int] = {}
    for number, cache in enumerate(caches or ()):
        for target in cache.targets or ():
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
