"""Puts the lost or damaged manifest of a store back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache.errors import CorruptFile, StoreNotFound
from cache.files.durable import replace_file
from cache.format.documents import document_bytes
from cache.format.layout import MANIFEST, scratch_path
from cache.format.schema import Manifest
from cache.read.reader import read_manifest
from cache.write.scratch import new_scratch
from cache.write.writer import parts_present


def restore_manifest(path: str | Path, manifest: Manifest) -> bool:
    """Put `manifest` where a store's own is lost or damaged; False, and nothing done, where it is sound.

    It then plans the parts that are there, too. Raises `UnreadableFile` or `UnsupportedFormat` where the store's own
    may well be sound, and `ForeignPart` if a part was written for another fingerprint or other arrays.
    """
    store = Path(path)
    try:
        read_manifest(store)
        return False
    except (StoreNotFound, CorruptFile):
        present = parts_present(store, manifest)
    planned = tuple(sorted({*manifest.planned_parts, *present}))
    scratch_path(store).mkdir(exist_ok=True)
    data = document_bytes(replace(manifest, planned_parts=planned).to_json())
    replace_file(store / MANIFEST, data, scratch=new_scratch(store, MANIFEST))
    return True
