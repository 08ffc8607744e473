"""Opens a store to read: any sample by its key, in any order, from any process."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CorruptFile, KeyNotInStore, StoreNotFound, UnknownArray, UnknownPart
from cache.files.any_path import AnyPath, Range, any_path, find_ranges, read_file
from cache.files.local_files import names_in, size_of
from cache.files.mirror import Mirror
from cache.format.blocks import decode_blocks
from cache.format.codec import Array, StoredArray
from cache.format.codecs import check_specs, decode_rows, stored_arrays
from cache.format.documents import digest_of, read_document
from cache.format.layout import INDEX, MANIFEST, PART_RECORD, PARTS, part_path
from cache.format.records import read_rejects
from cache.format.rows import Span
from cache.format.schema import ArraySpec, Manifest, SampleEntry
from cache.read.chunk_cache import ChunkCache
from cache.read.chunks import OpenArray
from cache.read.keys import Found, KeyTable
from cache.read.part_reader import FinishedPart

DEFAULT_CACHE_BYTES = 64 * 1024**2
"""Only chunks that samples share are kept, one or two an array and sample: this is room for those of a thousand
samples, which is what a shuffled window of blocks needs."""

_INDEXES_AT_ONCE = 64  # as bytes, which take more room than the columns made of them


class Store:
    """A store, read-only: a folder, or a URL that fsspec reads. Its parts are those finished when it was opened.

    Picklable and safe under fork and spawn: nothing open crosses into another process. One thread at a time.
    Opening reads the manifest and which parts are finished; the first look-up of a key reads every index.
    """

    def __init__(
        self, path: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES, mirror: Mirror | None = None
    ) -> None:
        self.path = any_path(path)
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

    def _start(self) -> None:
        self._process = -1
        self._chunks = ChunkCache(self.cache_bytes)
        self._finished = {
            name: FinishedPart(self.path, name, manifest=self.manifest, mirror=self.mirror)
            for name in self.parts
        }

    @property
    def missing_parts(self) -> tuple[str, ...]:
        """Planned parts that were not finished when the store was opened."""
        return tuple(sorted(set(self.manifest.planned_parts) - set(self.parts)))

    @cached_property
    def _keys(self) -> KeyTable:
        self._read_indexes()
        table = KeyTable((name, self._part(name).index.keys) for name in self.parts)
        table.check_duplicates()
        return table

    def check_keys(self) -> None:
        """Read every index now, and raise `DuplicateKey` if two samples share a key.

        Every look-up needs this once. Before a fork it spares the children the work and the memory.
        """
        self._keys.check_duplicates()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find([key]) != [None]

    def keys(self) -> Iterator[str]:
        """Iterate over every sample's key, part by part, in stored order."""
        return iter(self._keys)

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """Return of each key its part, and its sample's number there; None where the store does not have it."""
        return self._keys.find(keys)

    def locate(self, key: str) -> tuple[str, SampleEntry]:
        """Return the part and the entry of a sample. Raises `KeyNotInStore`."""
        part, sample = self._find_one(key)
        return part, self.entry(part, sample)

    def _find_one(self, key: str) -> Found:
        [found] = self.find([key])
        if found is None:
            missing = len(self.missing_parts)
            raise KeyNotInStore(key, path=self.path, num_samples=len(self), num_missing_parts=missing)
        return found

    def entries(self, part: str) -> Sequence[SampleEntry]:
        """Return what the index says of the part's samples, in stored order."""
        self._read_indexes()
        return [self.entry(part, sample) for sample in range(self.num_samples(part))]

    def keys_of(self, part: str) -> Sequence[str]:
        """Return the keys of the part's samples, in stored order."""
        self._read_indexes()
        return self._part(part).index.keys

    def num_samples(self, part: str) -> int:
        """Return how many samples the part holds."""
        return len(self._part(part).index.keys)

    def entry(self, part: str, sample: int) -> SampleEntry:
        """Return what the index says of one sample of the part, by its number."""
        return self._part(part).index.entry(sample)

    def source(self, part: str) -> dict[str, Any]:
        """Return what the part's record says of the shard that it was captured from."""
        return self._part(part).record.source

    def rejects(self, part: str) -> list[tuple[str, str]]:
        """Return (key, reason) of every sample of the part that could not be cached."""
        finished = self._part(part)
        return read_rejects(finished.path, finished.record)

    def contents(self, part: str, names: Sequence[str]) -> str:
        """Return a digest of the part's samples and of these stored arrays, from its record alone."""
        folders = tuple(f"{name}/" for name in names)
        files = self._part(part).record.files
        kept = [file for file in files if file == INDEX or file.startswith(folders)]
        return digest_of({file: files[file].blake3 for file in kept})

    def read(self, key: str, names: Sequence[str]) -> dict[str, Any]:
        """Return decoded arrays of one sample, float32 or integers, within each codec's stated error.

        Sample-owned: 'rows *row_shape'. Image-owned: '<the sample's images, in order> *row_shape'. A ragged array is
        a list with one array for each image of the sample, in order: 'rows *leading <tokens of the image>', without
        the rows if it is image-owned.

        Raises `KeyNotInStore`, `UnknownArray`, and `CorruptPart` or `UnreadableFile` naming the file.
        """
        [arrays] = self.read_many([key], names)
        return arrays

    def read_many(self, keys: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield what `read` returns, of each key in turn; all that they need is requested at once."""
        cache, specs = self._chunk_cache(), [self._spec(name) for name in names]
        stored = [(spec, stored_arrays(spec)) for spec in specs]
        found = [self._find_one(key) for key in keys]
        rows = cache.rows([
            wanted for key, place in zip(keys, found, strict=True) for wanted in self._rows(key, place, stored)
        ])  # fmt: skip
        for key, place in zip(keys, found, strict=True):
            with _naming(key):
                codes = [(spec, {one.suffix: next(rows) for one in some}) for spec, some in stored]
                arrays = {spec.name: self._decoded(spec, place, of_spec) for spec, of_spec in codes}
            yield arrays

    def _rows(
        self, key: str, place: Found, stored: Sequence[tuple[ArraySpec, Sequence[StoredArray]]]
    ) -> list[tuple[OpenArray, list[Span]]]:
        """Return a sample's stored arrays, and where its rows or elements lie in each."""
        part, sample = place
        wanted = [(spec, one) for spec, some in stored for one in some]
        with _naming(key):
            finished = self._part(part)
            spans = [finished.rows.spans(sample, spec, one) for spec, one in wanted]
            return list(zip(finished.arrays(wanted), spans, strict=True))

    def _decoded(self, spec: ArraySpec, place: Found, codes: dict[str, Array]) -> Array | list[Array]:
        """Return a sample's array, or the blocks of its images, from its stored arrays by suffix."""
        if not spec.is_ragged:
            return decode_rows(spec, codes)
        part, sample = place
        return decode_blocks(spec, codes, self._part(part).rows.block_shapes(sample, spec))

    def _chunk_cache(self) -> ChunkCache:
        """Return this process's own cache. After a fork the arrays are opened again: files may have changed."""
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

    def _read_indexes(self) -> None:
        """Read every index that was not read yet; from a server many at once. Local ones are read one by one."""
        if isinstance(self.path, Path):
            return
        todo = [part for part in self._finished.values() if not part.has_index]
        for start in range(0, len(todo), _INDEXES_AT_ONCE):
            some = todo[start : start + _INDEXES_AT_ONCE]
            for part, data in zip(
                some, find_ranges([Range(part.path / INDEX) for part in some]), strict=True
            ):
                with suppress(CacheError):  # raised again where this part is asked for
                    part.read_index(data)


@contextmanager
def _naming(key: str) -> Generator[None]:
    """Add to an error of a corrupt file the sample for which it was read."""
    try:
        yield
    except CorruptFile as error:
        raise error.for_key(key) from error


def read_manifest(path: AnyPath) -> Manifest:
    """Return the manifest of the store at `path`. Raises `StoreNotFound`, or an error that says what is wrong."""
    file = path / MANIFEST
    if (data := read_file(file)) is None:
        found = "no such file there"
        if isinstance(path, Path):
            found = "a directory without one" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise StoreNotFound(path, found)
    manifest = Manifest.from_json(read_document(file, data))
    check_specs(manifest.arrays)
    return manifest


def finished_parts(path: AnyPath, manifest: Manifest) -> dict[str, bytes | None]:
    """Return the parts that have their done-mark; from a server also the bytes of the mark.

    A server is asked for the marks of all planned parts at once, because not every server can list files. Raises
    `UnreadableFile` for a folder that this user may not enter: what is in it may well be finished.
    """
    planned = manifest.planned_parts
    if isinstance(path, Path):
        present = set(names_in(path / PARTS))  # may hold other things, which are no parts
        return {
            name: None
            for name in planned
            if name in present and size_of(path / PARTS / name / PART_RECORD) is not None
        }
    marks = find_ranges([Range(part_path(path, name) / PART_RECORD) for name in planned])
    return {name: data for name, data in zip(planned, marks, strict=True) if data is not None}
