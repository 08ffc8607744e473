"""Puts back the manifest of a store that lost it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CorruptFile, StoreNotFound
from cache.files.durable import replace_file
from cache.format.documents import document_bytes
from cache.format.layout import MANIFEST, PART_RECORD, PARTS, SCRATCH
from cache.format.records import read_part_record
from cache.format.schema import Manifest
from cache.read.reader import read_manifest
from cache.write.scratch import new_scratch
from cache.write.writer import parts_present


def restore_manifest(path: str | Path, manifest: Manifest) -> bool:
    """Write `manifest` if the store's own is lost or damaged; False, and nothing written, if it is sound.

    It then also plans the parts that are there, and is of their format. Raises `UnreadableFile` or
    `UnsupportedFormat` if the store's own may well be sound, and `ForeignPart` if a part was written for another
    fingerprint or other arrays.
    """
    store = Path(path)
    try:
        read_manifest(store)
        return False
    except (StoreNotFound, CorruptFile):
        manifest = _in_format_of_parts(store, manifest)
        planned = tuple(sorted({*manifest.planned_parts, *parts_present(store, manifest)}))
    (store / SCRATCH).mkdir(exist_ok=True)
    data = document_bytes(replace(manifest, planned_parts=planned).to_json())
    replace_file(store / MANIFEST, data, scratch=new_scratch(store, MANIFEST))
    return True


def _in_format_of_parts(store: Path, manifest: Manifest) -> Manifest:
    """Return the manifest in an older format, if the parts that can be read are of it and it can say the same."""
    found: set[int] = set()
    for mark in (store / PARTS).glob(f"*/{PART_RECORD}"):
        with suppress(CacheError):
            found.add(read_part_record(mark.parent).format_version)
    if found != {1}:
        return manifest
    tokens: Any = manifest.teacher.get("num_vision_tokens")
    if not isinstance(tokens, int) and any(spec.is_ragged for spec in manifest.arrays):
        return manifest  # format 1 holds no array whose length differs from image to image
    arrays = tuple(spec.with_tokens(tokens) if spec.is_ragged else spec for spec in manifest.arrays)
    fingerprint = replace(manifest.fingerprint, family="")
    return replace(manifest, format_version=1, arrays=arrays, fingerprint=fingerprint)
