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
    StoreNotFound,
    UnplannedPart,
    UnreadableFile,
    UnsafeName,
)
from cache.files.durable import replace_file, sync_directory
from cache.files.place import local
from cache.format.codecs import check_specs
from cache.format.documents import canonical_json, document_bytes, read_document
from cache.format.layout import (
    GROUP_METADATA,
    LEASES,
    LOCK,
    MANIFEST,
    PART_RECORD,
    PARTS,
    SCRATCH,
    ZARR_METADATA,
    check_part_name,
    leases_path,
    part_path,
    parts_path,
    scratch_path,
)
from cache.format.records import PartRecord, read_part_record
from cache.format.schema import Manifest, check_format
from cache.write.leases import lease, sweep_leases
from cache.write.locks import store_lock
from cache.write.part_writer import PartWriter
from cache.write.scratch import new_scratch, sweep_dead
from cache.write.taken_keys import TakenKeys

_REMEDY = "Restore the settings that the store was written with, or write to another directory."


class StoreWriter:
    """A store open for writing; any number of processes may each write parts of one store."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._contents = manifest.contents_digest()
        self.taken = TakenKeys(path, manifest, counts=lambda part: True)

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Create the store, or open it if it holds the same; planned parts are united.

        FingerprintMismatch, and nothing written, if fingerprint or arrays differ.
        """
        path = local(path, doing="written by stage 1")
        check_format(manifest.to_json(), "the manifest handed to StoreWriter.open")
        check_specs(manifest.arrays)
        canonical_json(manifest.to_json())  # so that what is no JSON is found before a directory is made
        _check_free_or_store(path)
        path.mkdir(parents=True, exist_ok=True)
        with store_lock(path):
            stored = _united(path, manifest)
            _prepare_directories(path)
            sweep_dead(path)
            sweep_leases(path)
            _write_manifest(path, stored)
        return cls(path, stored)

    def record(self, part: str) -> PartRecord | None:
        """The done-mark of a part; None while it is not finished.

        A mark that is damaged or cannot be read is no unfinished part: `CorruptPart` or `UnreadableFile` is raised.
        """
        directory = part_path(self.path, part)
        try:
            data = (directory / PART_RECORD).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UnreadableFile(directory / PART_RECORD, error) from error
        return read_part_record(directory, contents=self._contents, data=data)

    def is_done(self, part: str) -> bool:
        """True if the part is finished; raises as `record` does."""
        return self.record(part) is not None

    def leave_out(self, counts: Callable[[str], bool]) -> None:
        """Let the keys of parts that are to be replaced be free for others: those for whose names it is False."""
        self.taken = TakenKeys(self.path, self.manifest, counts=counts)

    def claim(self, part: str) -> AbstractContextManager[bool]:
        """Hold a part's lease for a block: True if it is ours, False while another writer is at work on it."""
        return lease(self.path, part)

    def part(self, name: str, *, source: Mapping[str, Any]) -> PartWriter:
        """A writer of one planned part; `source` says which shard it is made of (name, bytes ...)."""
        if name not in self.manifest.planned_parts:
            part_path(self.path, name)  # an unsafe name is told as such first
            raise UnplannedPart(name, num_planned=len(self.manifest.planned_parts))
        return PartWriter(self.path, self.manifest, name=name, source=source, taken=self.taken)


def _check_free_or_store(path: Path) -> None:
    """Refuse a directory with other things in it: a mistyped path must not be written to."""
    if path.exists() and not path.is_dir():
        raise StoreNotFound(path, "a file")
    ours = {MANIFEST, ZARR_METADATA, PARTS, SCRATCH, LEASES, LOCK}
    foreign = (
        sorted(entry.name for entry in path.iterdir() if entry.name not in ours) if path.is_dir() else []
    )
    if foreign and not (path / MANIFEST).exists():
        raise StoreNotFound(path, f"a directory with other things in it, such as {foreign[0]!r}")


def _united(path: Path, manifest: Manifest) -> Manifest:
    """The stored manifest with the parts of both; mine, with the parts that are there, where there is none."""
    planned = set(manifest.planned_parts)
    if not (path / MANIFEST).exists():
        return replace(manifest, planned_parts=tuple(sorted(planned | set(parts_present(path, manifest)))))
    stored = Manifest.from_json(read_document(path / MANIFEST))
    differences = stored.differences(manifest)
    if differences:
        raise FingerprintMismatch(path, differences, remedy=_REMEDY)
    return replace(stored, planned_parts=tuple(sorted(planned | set(stored.planned_parts))))


def parts_present(store: Path, manifest: Manifest) -> list[str]:
    """Names of the parts of a store without a manifest, all of them of this manifest's fingerprint and arrays.

    Raises `ForeignPart` for one that is not. A damaged part has a name all the same.
    """
    names: list[str] = []
    for mark in sorted(parts_path(store).glob(f"*/{PART_RECORD}")):
        with suppress(CorruptPart, UnreadableFile):
            read_part_record(mark.parent, contents=manifest.contents_digest())
        with suppress(UnsafeName):
            names.append(check_part_name(mark.parent.name))
    return names


def _prepare_directories(path: Path) -> None:
    parts_path(path).mkdir(exist_ok=True)
    scratch_path(path).mkdir(exist_ok=True)
    leases_path(path).mkdir(exist_ok=True)
    for group in (path, parts_path(path)):
        _write_if_changed(path, group / ZARR_METADATA, canonical_json(GROUP_METADATA))
    sync_directory(path)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    _write_if_changed(path, path / MANIFEST, document_bytes(manifest.to_json()))


def _write_if_changed(store: Path, file: Path, data: bytes) -> None:
    if not file.exists() or file.read_bytes() != data:
        replace_file(file, data, scratch=new_scratch(store, file.name))
