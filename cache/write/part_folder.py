"""A part's folder while it is written: its record has the hash of each file as written; one rename publishes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from cache.errors import CacheError, HoldsFewer, PartLost
from cache.files.durable import hash_bytes, publish, sync_directory, sync_folders, write_file
from cache.files.local_files import is_there, sizes_below
from cache.format.documents import canonical_json, document_bytes
from cache.format.index import PartIndex
from cache.format.layout import GROUP_METADATA, INDEX, PART_RECORD, ZARR_METADATA, part_path
from cache.format.records import FileRecord, PartRecord, read_part_file, read_part_record
from cache.write.leases import store_lock
from cache.write.scratch import REPLACED, new_scratch, remove


class PartFolder:
    """A folder in tmp/, and `files`, the record of every file that was written into it.

    The record is of what was written, never of what is found in the folder: if another process removes or changes
    files there, the part is not published.
    """

    def __init__(self, store: Path, name: str) -> None:
        self.path = new_scratch(store, name)
        self.path.mkdir()
        self.files: dict[str, FileRecord] = {}
        self._store, self._name = store, name

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write one file, by its path relative to the part."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, data)
        self.files[name] = FileRecord(len(data), hash_bytes(data))

    def write_groups(self, arrays: list[str]) -> None:
        """Make every folder above the arrays a Zarr group."""
        groups = {PurePosixPath(), *(group for name in arrays for group in PurePosixPath(name).parents)}
        for group in sorted(groups):
            self.write(str(group / ZARR_METADATA), canonical_json(GROUP_METADATA))

    def publish(
        self,
        record: PartRecord,
        *,
        replace: bool = False,
        may_hold_fewer: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> PartRecord | None:
        """Write the record and rename the folder to its place; None, or the record of the part found there.

        Without `replace` a finished part stays, and so does one that is damaged or cannot be read: its error is
        raised. With it the part that is there makes room; it must hold no more samples than this one, unless
        `may_hold_fewer`, and never makes room for an empty part: else `HoldsFewer`. `check` runs while no other
        writer can publish. Raises `PartLost` if a file of the folder is gone.
        """
        self._seal(record)
        target = part_path(self._store, self._name)
        with store_lock(self._store):
            check()
            while not publish(self.path, target):
                if not replace and is_there(target / PART_RECORD):
                    return read_part_record(target, contents=record.contents)
                _check_not_fewer(target, record, may_hold_fewer=may_hold_fewer)
                if self._swap(target):
                    break
        return None

    def remove(self) -> None:
        """Remove what was not published; of a published part nothing is left here."""
        remove(self.path)

    def _seal(self, record: PartRecord) -> None:
        """Force everything to the disk, and then the done-mark, so that it never exists before what it lists."""
        found = sizes_below(self.path)
        if lost := {name for name, file in self.files.items() if found.get(name) != file.bytes}:
            raise PartLost(self._name, folder=self.path, missing=lost)
        sync_folders(self.path)
        write_file(self.path / PART_RECORD, document_bytes(record.to_json()))
        sync_directory(self.path)

    def _swap(self, target: Path) -> bool:
        """Put this folder in the place of another one; False if a third writer came first.

        A failure puts the other one back; after a crash between the two renames `sweep_dead` does.
        """
        aside = new_scratch(self._store, f"{target.name}{REPLACED}")
        with suppress(FileNotFoundError):  # another writer is doing the same
            publish(target, aside)
        try:
            published = publish(self.path, target)
        except OSError:
            publish(aside, target)
            raise
        remove(aside)
        return published


def _check_not_fewer(target: Path, record: PartRecord, *, may_hold_fewer: bool) -> None:
    held, now = _num_samples(target), record.counts.cached
    if held is None:  # unknown; a folder without a done-mark is no part and loses nothing
        loses = not may_hold_fewer and is_there(target / PART_RECORD)
    else:
        loses = now < held and (now == 0 or not may_hold_fewer)
    if loses:
        raise HoldsFewer(record.part, held=held, now=now)


def _num_samples(part: Path) -> int | None:
    """Return how many samples a part holds by its record or, if that is damaged, its index; None if neither says."""
    with suppress(CacheError):
        return read_part_record(part).counts.cached
    with suppress(CacheError):
        return len(read_part_file(part / INDEX, PartIndex.from_json).keys)
    return None
