"""Opens a store to write: its manifest, what is done already, and a writer for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.errors import (
    CorruptPart,
    FingerprintMismatch,
    FormatMismatch,
    MisusedWriter,
    StoreNotFound,
    UnreadableFile,
    UnsafeName,
)
from cache.files.any_path import local, read_file
from cache.files.durable import replace_file, sync_directory
from cache.format import layout
from cache.format.codecs import check_specs
from cache.format.documents import canonical_json, document_bytes, read_document
from cache.format.layout import FORMAT_VERSION, MANIFEST, PART_RECORD, part_path
from cache.format.records import PartRecord, read_part_record
from cache.format.schema import Manifest, check_format
from cache.write.leases import lease, store_lock, sweep_leases
from cache.write.part_writer import PartWriter
from cache.write.scratch import new_scratch, sweep_dead
from cache.write.taken_keys import TakenKeys


class StoreWriter:
    """A store open for writing; any number of processes may each write parts of one store."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._contents = manifest.contents_digest()
        self.taken = TakenKeys(path, manifest, counts=lambda part: True)

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Create the store, or open it if it holds the same; it then plans the parts of both manifests.

        Raises `FingerprintMismatch`, and writes nothing, if fingerprint or arrays differ, `FormatMismatch` if the
        formats do. A manifest of format 1 is for copies of finished parts: no part can be captured for it.
        """
        path = local(path, doing="written by stage 1")
        check_format(manifest.to_json(), "the manifest handed to StoreWriter.open")
        check_specs(manifest.arrays)
        canonical_json(manifest.to_json())  # fails now, not after a directory was made, if a value is no JSON
        _check_free_or_store(path)
        path.mkdir(parents=True, exist_ok=True)
        with store_lock(path):
            stored = _united(path, manifest)
            for name in (layout.PARTS, layout.SCRATCH, layout.LEASES):
                (path / name).mkdir(exist_ok=True)
            for group in (path, path / layout.PARTS):
                group_data = canonical_json(layout.GROUP_METADATA)
                _write_if_changed(path, group / layout.ZARR_METADATA, group_data)
            sync_directory(path)
            sweep_dead(path)
            sweep_leases(path)
            _write_if_changed(path, path / MANIFEST, document_bytes(stored.to_json()))
        return cls(path, stored)

    def record(self, part: str) -> PartRecord | None:
        """Return the done-mark of a part; None while it is not finished.

        A part whose mark is damaged or cannot be read may be finished: `CorruptPart` or `UnreadableFile` is raised.
        """
        folder = part_path(self.path, part)
        data = read_file(folder / PART_RECORD)
        return None if data is None else read_part_record(folder, contents=self._contents, data=data)

    def is_done(self, part: str) -> bool:
        """Return whether the part is finished; raises as `record` does."""
        return self.record(part) is not None

    def set_provenance(self, name: str, value: Any) -> None:
        """Set one field of the stored provenance, which no fingerprint and no part depends on."""
        with store_lock(self.path):
            stored = Manifest.from_json(read_document(self.path / MANIFEST))
            stored = replace(stored, provenance={**stored.provenance, name: value})
            _write_if_changed(self.path, self.path / MANIFEST, document_bytes(stored.to_json()))
        self.manifest = replace(self.manifest, provenance=stored.provenance)

    def leave_out(self, counts: Callable[[str], bool]) -> None:
        """Free the keys of parts that are to be replaced, for whose names `counts` is False."""
        self.taken = TakenKeys(self.path, self.manifest, counts=counts)

    def claim(self, part: str) -> AbstractContextManager[bool]:
        """Hold a part's lease for a block: True if it is ours, False while another writer holds it."""
        return lease(self.path, part)

    def part(self, name: str, *, source: Mapping[str, Any] | None = None) -> PartWriter:
        """Return a writer of one planned part; `source` says which shard it is made of (name, bytes ...).

        Where that is known only later, set the writer's `source` before `commit`.
        """
        part_path(self.path, name)  # raises UnsafeName
        if self.manifest.format_version != FORMAT_VERSION:
            raise _mismatch(self.path, found=self.manifest.format_version, asked=FORMAT_VERSION)
        if name not in self.manifest.planned_parts:
            raise MisusedWriter(
                f"Part {name!r} is not among the {len(self.manifest.planned_parts)} planned parts of the store; "
                "open the writer with a manifest whose planned_parts lists it."
            )
        return PartWriter(self.path, self.manifest, name=name, source=source or {}, taken=self.taken)


def _check_free_or_store(path: Path) -> None:
    """Refuse a directory with other things in it: a mistyped path must not be written to."""
    if path.exists() and not path.is_dir():
        raise StoreNotFound(path, "a file")
    ours = {MANIFEST, layout.ZARR_METADATA, layout.PARTS, layout.SCRATCH, layout.LEASES, layout.LOCK}
    foreign = sorted({entry.name for entry in path.iterdir()} - ours) if path.is_dir() else []
    if foreign and not (path / MANIFEST).exists():
        raise StoreNotFound(path, f"a directory with other things in it, such as {foreign[0]!r}")


def _united(path: Path, manifest: Manifest) -> Manifest:
    """Return the stored manifest, planning the parts of both; where there is none, mine and the parts present."""
    stored, planned = manifest, set(manifest.planned_parts)
    if (path / MANIFEST).exists():
        stored = Manifest.from_json(read_document(path / MANIFEST))
        if stored.format_version != manifest.format_version:
            raise _mismatch(path, found=stored.format_version, asked=manifest.format_version)
        planned |= set(stored.planned_parts)
        if differences := stored.differences(manifest):
            remedy = "Restore the settings that the store was written with, or write to another directory."
            raise FingerprintMismatch(path, differences, remedy=remedy)
    else:
        planned |= set(parts_present(path, manifest))
    return replace(stored, planned_parts=tuple(sorted(planned)))


def _mismatch(path: Path, *, found: int, asked: int) -> FormatMismatch:
    remedy = "parts are added in a store's own format: write to another directory, or use the version that began it"
    return FormatMismatch(path, found=found, asked=asked, remedy=remedy)


def parts_present(store: Path, manifest: Manifest) -> list[str]:
    """Return the names of the parts in a store without a manifest, damaged ones too.

    Raises `ForeignPart` for a part of another fingerprint or other arrays than this manifest's.
    """
    names: list[str] = []
    for mark in sorted((store / layout.PARTS).glob(f"*/{PART_RECORD}")):
        with suppress(CorruptPart, UnreadableFile):
            read_part_record(mark.parent, contents=manifest.contents_digest())
        with suppress(UnsafeName):
            names.append(layout.check_part_name(mark.parent.name))
    return names


def _write_if_changed(store: Path, file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        replace_file(file, data, scratch=new_scratch(store, file.name))
