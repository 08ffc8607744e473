"""Opens a store to read: any sample by its key, in any order, from any process."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CorruptFile, KeyNotInStore, StoreNotFound, UnknownArray, UnknownPart
from cache.files.local_files import names_in, size_of
from cache.files.mirror import Mirror
from cache.files.place import Place, Range, find_ranges, place
from cache.format.codecs import Array, check_specs, decode_rows, stored_arrays
from cache.format.documents import digest_of, read_document
from cache.format.layout import INDEX, MANIFEST, PART_RECORD, part_path, parts_path
from cache.format.records import read_rejects
from cache.format.schema import ArraySpec, Manifest, SampleEntry
from cache.read.chunk_cache import ChunkCache
from cache.read.chunks import OpenArray
from cache.read.keys import Found, KeyTable
from cache.read.part_reader import FinishedPart

DEFAULT_CACHE_BYTES = 64 * 1024**2
"""Only chunks that samples share are kept, at most one or two an array and sample: room for those of a thousand
samples, which is what a shuffled window of blocks needs."""


_INDEXES_AT_ONCE = 64  # as bytes, which take more room than what is read from them


class Store:
    """A store, read-only: a folder, or a URL that fsspec reads. Its parts are those finished when it was opened.

    Picklable and safe under fork and spawn: nothing open crosses into another process. One thread at a time.
    Nothing but the manifest is read before it is asked for; the first look-up of a key reads every index.
    """

    def __init__(
        self, path: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES, mirror: Mirror | None = None
    ) -> None:
        self.path = place(path)
        self.cache_bytes = cache_bytes
        self.mirror = mirror
        self.manifest = read_manifest(self.path)
        records = finished_parts(self.path, self.manifest)
        self.parts = tuple(sorted(records))
        self._start()
        for name, data in records.items():
            self._finished[name].record_data = data

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("path", "cache_bytes", "mirror", "manifest", "parts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def missing_parts(self) -> tuple[str, ...]:
        """Planned parts that were not finished when the store was opened."""
        return tuple(sorted(set(self.manifest.planned_parts) - set(self.parts)))

    def __len__(self) -> int:
        return len(self._keys())

    def load_keys(self) -> None:
        """Read every part's index now. Raises `CacheError` if a key occurs twice."""
        self._keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find([key]) != [None]

    def keys(self) -> Iterator[str]:
        """Every sample's key, part by part, in stored order."""
        return iter(self._keys())

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """Of each key its part, and its sample's number there; None where the store does not have it."""
        return self._keys().find(keys)

    def entries(self, part: str) -> Sequence[SampleEntry]:
        """What the index says of the part's samples, in stored order."""
        self._read_indexes()
        index = self._part(part).index
        return [index.entry(sample) for sample in range(len(index.keys))]

    def keys_of(self, part: str) -> Sequence[str]:
        """The keys of the part's samples, in stored order."""
        self._read_indexes()
        return self._part(part).index.keys

    def num_samples(self, part: str) -> int:
        """How many samples the part holds."""
        return len(self._part(part).index.keys)

    def entry(self, part: str, sample: int) -> SampleEntry:
        """What the index says of one sample of the part, by its number."""
        return self._part(part).index.entry(sample)

    def source(self, part: str) -> dict[str, Any]:
        """What the part's record says of the shard that it was captured from."""
        return self._part(part).record.source

    def rejects(self, part: str) -> list[tuple[str, str]]:
        """(key, reason) of every sample of the part that could not be cached."""
        finished = self._part(part)
        return read_rejects(finished.path, finished.record)

    def contents(self, part: str, names: Sequence[str]) -> str:
        """Digest of the part's samples and of what is stored of these arrays, by its record: nothing else is read."""
        folders = tuple(f"{name}/" for name in names)
        files = self._part(part).record.files
        return digest_of({
            file: said.blake3 for file, said in files.items() if file == INDEX or file.startswith(folders)
        })  # fmt: skip

    def locate(self, key: str) -> tuple[str, SampleEntry]:
        part, sample = self._place(key)
        return part, self.entry(part, sample)

    def rows(self, key: str, name: str) -> int:
        """How many rows `read` gives for this array, from the index alone."""
        part, sample = self._place(key)
        spans = self._part(part).index.row_spans(sample, self._spec(name))
        return sum(stop - start for start, stop in spans)

    def read(self, key: str, names: Sequence[str]) -> dict[str, Array]:
        """Decoded arrays of one sample, float32 or integers, within each codec's stated error.

        Sample-owned: 'rows *row_shape'. Image-owned: '<the sample's images, in order> *row_shape'.
        """
        [arrays] = self.read_many([key], names)
        return arrays

    def read_many(self, keys: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Array]]:
        """What `read` gives, of each key in turn; all that they need is asked for at once."""
        cache, specs = self._chunk_cache(), [self._spec(name) for name in names]
        rows = cache.rows([wanted for key in keys for wanted in self._rows(key, specs)])
        for key in keys:
            with _named(key):
                arrays = _decoded(specs, rows)
            yield arrays

    def _rows(self, key: str, specs: Sequence[ArraySpec]) -> list[tuple[OpenArray, list[tuple[int, int]]]]:
        """A sample's stored arrays, and where its rows lie in each."""
        part, sample = self._place(key)
        stored = [(spec, one) for spec in specs for one in stored_arrays(spec)]
        with _named(key):
            finished = self._part(part)
            spans = [finished.index.row_spans(sample, spec) for spec, _ in stored]
            return list(zip(finished.arrays(stored), spans, strict=True))

    def _start(self) -> None:
        self._process = -1
        self._chunks = ChunkCache(self.cache_bytes)
        self._key_table: KeyTable | None = None
        self._finished = {
            name: FinishedPart(self.path, name, manifest=self.manifest, mirror=self.mirror)
            for name in self.parts
        }

    def _chunk_cache(self) -> ChunkCache:
        """This process's own: arrays opened before a fork are opened again after it."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._chunks = ChunkCache(self.cache_bytes)
            for part in self._finished.values():
                part.close_arrays()
        return self._chunks

    def _part(self, name: str) -> FinishedPart:
        if name not in self._finished:
            raise UnknownPart(name, path=self.path, num_parts=len(self.parts))
        return self._finished[name]

    def _spec(self, name: str) -> ArraySpec:
        specs = self.manifest.specs
        if name not in specs:
            raise UnknownArray(name, known=specs, path=self.path)
        return specs[name]

    def _place(self, key: str) -> Found:
        [place] = self.find([key])
        if place is None:
            missing = len(self.missing_parts)
            raise KeyNotInStore(key, path=self.path, num_samples=len(self), num_missing_parts=missing)
        return place

    def _keys(self) -> KeyTable:
        if self._key_table is None:
            self._read_indexes()
            self._key_table = KeyTable((name, self._part(name).index.keys) for name in self.parts)
        return self._key_table

    def _read_indexes(self) -> None:
        """Every index that was not read yet; from a server many come together, not one by one."""
        if isinstance(self.path, Path):
            return
        todo = [(part, file) for part in self._finished.values() if (file := part.index_file)]
        for start in range(0, len(todo), _INDEXES_AT_ONCE):
            some = todo[start : start + _INDEXES_AT_ONCE]
            for (part, _), data in zip(some, find_ranges([Range(file) for _, file in some]), strict=True):
                part.index_data = data
                with suppress(CacheError):  # it is raised where the part is asked for
                    _ = part.index


@contextmanager
def _named(key: str) -> Generator[None]:
    """What is found to be corrupt tells for which sample it was read."""
    try:
        yield
    except CorruptFile as error:
        raise error.for_key(key) from error


def _decoded(specs: Sequence[ArraySpec], rows: Iterator[Array]) -> dict[str, Array]:
    """A sample's arrays from the rows that come next, those of each stored array."""
    return {
        spec.name: decode_rows(spec, {stored.suffix: next(rows) for stored in stored_arrays(spec)})
        for spec in specs
    }


def read_manifest(path: Place) -> Manifest:
    """The manifest of the store at `path`; StoreNotFound if there is none."""
    file = path / MANIFEST
    data = find_ranges([Range(file)])[0]
    if data is None:
        raise StoreNotFound(path, _found_at(path))
    manifest = Manifest.from_json(read_document(file, data))
    check_specs(manifest.arrays)
    return manifest


def _found_at(path: Place) -> str:
    if not isinstance(path, Path):
        return "no such file there"
    return "a directory without one" if path.is_dir() else "a file" if path.exists() else "nothing"


def finished_parts(path: Place, manifest: Manifest) -> dict[str, bytes | None]:
    """Names of the parts that carry their done-mark; from a server also what the mark says.

    A server is asked for every planned part, all at once: not all of them can list what they have. Raises
    `UnreadableFile` for a folder that this user may not enter: what is in it may well be finished.
    """
    if isinstance(path, Path):
        parts = parts_path(path)
        planned = set(names_in(parts)) & set(manifest.planned_parts)  # what else lies there is no part
        names = [name for name in sorted(planned) if size_of(parts / name / PART_RECORD) is not None]
        return dict.fromkeys(names)
    names = manifest.planned_parts
    marks = find_ranges([Range(part_path(path, name) / PART_RECORD) for name in names])
    return {name: data for name, data in zip(names, marks, strict=True) if data is not None}
