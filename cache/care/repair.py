"""Puts back the manifest of a store that lost it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache.errors import CorruptFile, StoreNotFound
from cache.files.durable import replace_file
from cache.format.documents import document_bytes
from cache.format.layout import MANIFEST, SCRATCH
from cache.format.schema import Manifest
from cache.read.reader import read_manifest
from cache.write.scratch import new_scratch
from cache.write.writer import parts_present


def restore_manifest(path: str | Path, manifest: Manifest) -> bool:
    """Write `manifest` if the store's own is lost or damaged; False, and nothing written, if it is sound.

    It then also plans the parts that are there. Raises `UnreadableFile` or `UnsupportedFormat` if the store's own may
    well be sound, and `ForeignPart` if a part was written for another fingerprint or other arrays.
    """
    store = Path(path)
    try:
        read_manifest(store)
        return False
    except (StoreNotFound, CorruptFile):
        planned = tuple(sorted({*manifest.planned_parts, *parts_present(store, manifest)}))
    (store / SCRATCH).mkdir(exist_ok=True)
    data = document_bytes(replace(manifest, planned_parts=planned).to_json())
    replace_file(store / MANIFEST, data, scratch=new_scratch(store, MANIFEST))
    return True
