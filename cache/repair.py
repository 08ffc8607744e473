"""Puts the lost or damaged manifest of a store back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache.documents import document_bytes
from cache.durable import replace_file
from cache.errors import CacheError, CorruptFile
from cache.layout import MANIFEST, PART_RECORD, parts_path, scratch_path
from cache.reader import read_manifest
from cache.records import read_part_record
from cache.schema import Manifest
from cache.scratch import new_scratch


def restore_manifest(path: str | Path, manifest: Manifest) -> bool:
    """Put `manifest` where a store's own is lost or damaged; False, and nothing done, where it is sound.

    Raises `CorruptFile` if a part says that it was written for another fingerprint or other arrays.
    """
    store = Path(path)
    try:
        read_manifest(store)
        return False
    except CacheError:
        present = _readable_parts(store, manifest)
    planned = tuple(sorted({*manifest.planned_parts, *present}))
    scratch_path(store).mkdir(exist_ok=True)
    data = document_bytes(replace(manifest, planned_parts=planned).to_json())
    replace_file(store / MANIFEST, data, scratch=new_scratch(store, MANIFEST))
    return True


def _readable_parts(store: Path, manifest: Manifest) -> list[str]:
    """Parts whose record can be read, all of them of this manifest's fingerprint and arrays."""
    names: list[str] = []
    contents = manifest.contents_digest()
    for mark in sorted(parts_path(store).glob(f"*/{PART_RECORD}")):
        try:
            record = read_part_record(mark.parent)
        except CorruptFile:
            continue  # a damaged part is found by `verify`, and written again
        if record.contents != contents:
            raise CorruptFile(
                store / MANIFEST,
                f"it is lost, and part {record.part} was not written with this config, so it cannot be put back",
            )
        names.append(record.part)
    return names
