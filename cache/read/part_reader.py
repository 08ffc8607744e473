"""One finished part: its records and its arrays, each read or opened when first asked for."""

from __future__ import annotations

from collections.abc import Sequence

from cache.files.mirror import Mirror
from cache.files.place import Place, RemotePath
from cache.format.codecs import StoredArray
from cache.format.index import PartIndex, read_part_index
from cache.format.layout import INDEX, part_path
from cache.format.records import PartRecord, read_part_record
from cache.format.schema import ArraySpec, Manifest
from cache.read.chunks import OpenArray, Wanted, open_arrays


class FinishedPart:
    """Reading, and nothing else, raises CorruptPart where the part is not what it says."""

    def __init__(self, store: Place, name: str, *, manifest: Manifest, mirror: Mirror | None = None) -> None:
        self._path = part_path(store, name)
        self._manifest = manifest
        self._mirror = mirror
        self.record_data: bytes | None = None  # the files' bytes, where they came with those of other parts
        self.index_data: bytes | None = None
        self._record: PartRecord | None = None
        self._index: PartIndex | None = None
        self._arrays: dict[str, OpenArray] = {}

    @property
    def path(self) -> Place:
        """The part's folder; what its record lists is read through the mirror, which keeps files by such a record."""
        if self._mirror and isinstance(self._path, RemotePath):
            return RemotePath(self._path.url, self._mirror.of(self.record.version()))
        return self._path

    @property
    def record(self) -> PartRecord:
        if self._record is None:
            contents = self._manifest.contents_digest()
            self._record = read_part_record(self._path, contents=contents, data=self.record_data)
            self.record_data = None
        return self._record

    @property
    def index(self) -> PartIndex:
        if self._index is None:
            self._index = read_part_index(self.path, self._manifest, data=self.index_data)
            self.index_data = None
        return self._index

    @property
    def index_file(self) -> Place | None:
        """Where the index is to be read from; None if it was."""
        if self._index is not None or self.index_data is not None:
            return None
        return self.path / INDEX

    def arrays(self, wanted: Sequence[tuple[ArraySpec, StoredArray]]) -> list[OpenArray]:
        """The stored arrays, those that were not asked for before opened together."""
        todo = [
            Wanted(stored.name(spec), stored, self.index.num_rows(spec))
            for spec, stored in wanted
            if stored.name(spec) not in self._arrays
        ]
        opened = open_arrays(self.path, todo, files=self.record.files) if todo else []
        self._arrays |= {one.name: array for one, array in zip(todo, opened, strict=True)}
        return [self._arrays[stored.name(spec)] for spec, stored in wanted]

    def close_arrays(self) -> None:
        self._arrays.clear()
