"""One finished part: its records and its arrays, each read or opened when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from cache.files.any_path import AnyPath, RemotePath
from cache.files.mirror import Mirror
from cache.format.codec import StoredArray
from cache.format.index import PartIndex
from cache.format.layout import part_path
from cache.format.records import PartRecord, read_part_record
from cache.format.rows import PartRows, read_part_rows
from cache.format.schema import ArraySpec, Manifest
from cache.read.chunks import OpenArray, Wanted, open_arrays


class FinishedPart:
    """Whatever is read raises `CorruptPart` if it is not what the part says of itself."""

    def __init__(
        self, store: AnyPath, name: str, *, manifest: Manifest, mirror: Mirror | None = None
    ) -> None:
        self._path = part_path(store, name)
        self._manifest = manifest
        self._mirror = mirror
        self.record_data: bytes | None = (
            None  # the bytes of part.json, if they came with those of other parts
        )
        self._arrays: dict[str, OpenArray] = {}

    @property
    def path(self) -> AnyPath:
        """The part's folder. Files below it are read through the mirror, which keeps them by the record's version."""
        if self._mirror and isinstance(self._path, RemotePath):
            return RemotePath(self._path.url, replace(self._mirror, version=self.record.version()))
        return self._path

    @cached_property
    def record(self) -> PartRecord:
        contents, data = self._manifest.contents_digest(), self.record_data
        self.record_data = None
        return read_part_record(self._path, contents=contents, data=data)

    @property
    def index(self) -> PartIndex:
        return self.rows.index

    @cached_property
    def rows(self) -> PartRows:
        return read_part_rows(self.path, self._manifest)

    @property
    def has_index(self) -> bool:
        """Whether the index was read already."""
        return "rows" in vars(self)

    def read_index(self, data: bytes | None) -> None:
        """Make the index of its file's bytes, where they came with those of other parts."""
        self.rows = read_part_rows(self.path, self._manifest, data=data)

    def arrays(self, wanted: Sequence[tuple[ArraySpec, StoredArray]]) -> list[OpenArray]:
        """Return the stored arrays; those that were not asked for before are opened together."""
        todo = [
            Wanted(stored.name(spec), stored, self.rows.length(spec, stored))
            for spec, stored in wanted
            if stored.name(spec) not in self._arrays
        ]
        if todo:
            opened = open_arrays(self.path, todo, files=self.record.files)
            self._arrays |= {one.name: array for one, array in zip(todo, opened, strict=True)}
        return [self._arrays[stored.name(spec)] for spec, stored in wanted]

    def close_arrays(self) -> None:
        self._arrays.clear()
