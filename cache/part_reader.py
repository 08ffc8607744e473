"""One finished part: its records and its arrays, each read or opened when first asked for."""

from __future__ import annotations

from pathlib import Path

from cache.arrays import OpenArray, open_array
from cache.codecs import StoredArray
from cache.index import PartIndex, read_part_index
from cache.layout import part_path
from cache.records import PartRecord, read_part_record
from cache.schema import ArraySpec, Manifest


class FinishedPart:
    """Reading, and nothing else, raises CorruptPart where the part is not what it says."""

    def __init__(self, store: Path, name: str, *, manifest: Manifest) -> None:
        self.path = part_path(store, name)
        self._manifest = manifest
        self._record: PartRecord | None = None
        self._index: PartIndex | None = None
        self._arrays: dict[str, OpenArray] = {}

    @property
    def record(self) -> PartRecord:
        if self._record is None:
            self._record = read_part_record(self.path, contents=self._manifest.contents_digest())
        return self._record

    @property
    def index(self) -> PartIndex:
        if self._index is None:
            self._index = read_part_index(self.path, self._manifest)
        return self._index

    def array(self, spec: ArraySpec, stored: StoredArray) -> OpenArray:
        name = stored.name(spec)
        if name not in self._arrays:
            self._arrays[name] = open_array(
                self.path, name, stored=stored, rows=self.index.num_rows(spec), files=self.record.files
            )
        return self._arrays[name]

    def close_arrays(self) -> None:
        self._arrays.clear()
