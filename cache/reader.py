"""Opens a store to read: any sample by its key, in any order, from any process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache.arrays import ChunkCache
from cache.codecs import Array, StoredArray, check_specs, decode_rows, stored_arrays
from cache.documents import read_document
from cache.errors import CorruptFile, DuplicateKey, KeyNotInStore, StoreNotFound, UnknownArray, UnknownPart
from cache.layout import MANIFEST, PART_RECORD, parts_path
from cache.part_reader import FinishedPart
from cache.records import read_rejects
from cache.schema import ArraySpec, Manifest, SampleEntry

DEFAULT_CACHE_BYTES = 256 * 1024**2


class Store:
    """A store, read-only. Its finished parts are those at the moment of opening, also after pickling.

    Picklable and safe under fork and spawn: nothing open crosses into another process. One thread at a time.
    Nothing but the manifest is read before it is asked for; the first look-up of a key reads every index.
    """

    def __init__(self, path: str | Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.path = Path(path)
        self.cache_bytes = cache_bytes
        self.manifest = read_manifest(self.path)
        self.parts = finished_parts(self.path)
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("path", "cache_bytes", "manifest", "parts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def missing_parts(self) -> tuple[str, ...]:
        """Planned parts that were not finished when the store was opened."""
        return tuple(sorted(set(self.manifest.planned_parts) - set(self.parts)))

    def __len__(self) -> int:
        return len(self._places())

    def __contains__(self, key: object) -> bool:
        return key in self._places()

    def keys(self) -> Iterator[str]:
        """Every sample's key, part by part, in stored order."""
        return iter(self._places())

    def entries(self, part: str) -> Sequence[SampleEntry]:
        index = self._part(part).index
        return [index.entry(sample) for sample in range(len(index.keys))]

    def rejects(self, part: str) -> list[tuple[str, str]]:
        """(key, reason) of every sample of the part that could not be cached."""
        finished = self._part(part)
        return read_rejects(finished.path, finished.record)

    def locate(self, key: str) -> tuple[str, SampleEntry]:
        part, sample = self._place(key)
        return part, self._part(part).index.entry(sample)

    def rows(self, key: str, name: str) -> int:
        """How many rows `read` gives for this array, from the index alone."""
        part, sample = self._place(key)
        index = self._part(part).index
        if self._spec(name).owner == "image":
            return len(index.image_rows(sample))
        start, stop = index.sample_rows(sample, name)
        return stop - start

    def read(self, key: str, names: Sequence[str]) -> dict[str, Array]:
        """Decoded arrays of one sample, float32 or integers, within each codec's stated error.

        Sample-owned: 'rows *row_shape'. Image-owned: '<the sample's images, in order> *row_shape'.
        """
        part, sample = self._place(key)
        try:
            return {name: self._read(self._part(part), sample, self._spec(name)) for name in names}
        except CorruptFile as error:
            raise error.for_key(key) from error

    def _read(self, part: FinishedPart, sample: int, spec: ArraySpec) -> Array:
        read_rows = self._image_rows if spec.owner == "image" else self._sample_rows
        codes = {stored.suffix: read_rows(part, sample, spec, stored) for stored in stored_arrays(spec)}
        return decode_rows(spec, codes)

    def _sample_rows(self, part: FinishedPart, sample: int, spec: ArraySpec, stored: StoredArray) -> Array:
        start, stop = part.index.sample_rows(sample, spec.name)
        if start == stop:
            return _no_rows(stored)
        return self._chunk_cache().rows(part.array(spec, stored), start, stop)

    def _image_rows(self, part: FinishedPart, sample: int, spec: ArraySpec, stored: StoredArray) -> Array:
        cache = self._chunk_cache()
        numbers = part.index.image_rows(sample)
        rows = [cache.rows(part.array(spec, stored), number, number + 1) for number in numbers]
        return np.concatenate([_no_rows(stored), *rows])

    def _start(self) -> None:
        self._process = -1
        self._chunks = ChunkCache(self.cache_bytes)
        self._by_key: dict[str, tuple[str, int]] | None = None
        self._finished = {name: FinishedPart(self.path, name, manifest=self.manifest) for name in self.parts}

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

    def _place(self, key: str) -> tuple[str, int]:
        places = self._places()
        if key not in places:
            missing = len(self.missing_parts)
            raise KeyNotInStore(key, path=self.path, num_samples=len(places), num_missing_parts=missing)
        return places[key]

    def _places(self) -> dict[str, tuple[str, int]]:
        if self._by_key is None:
            self._by_key = index_keys((name, self._part(name).index.keys) for name in self.parts)
        return self._by_key


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`; StoreNotFound if there is none."""
    if not path.is_dir():
        raise StoreNotFound(path, "a file" if path.exists() else "nothing")
    if not (path / MANIFEST).exists():
        raise StoreNotFound(path, "a directory without one")
    manifest = Manifest.from_json(read_document(path / MANIFEST))
    check_specs(manifest.arrays)
    return manifest


def finished_parts(path: Path) -> tuple[str, ...]:
    """Names of the parts that carry their done-mark."""
    return tuple(sorted(mark.parent.name for mark in parts_path(path).glob(f"*/{PART_RECORD}")))


def index_keys(parts: Iterable[tuple[str, Sequence[str]]]) -> dict[str, tuple[str, int]]:
    """Part and place of every key; DuplicateKey if two samples share one."""
    places: dict[str, tuple[str, int]] = {}
    for part, keys in parts:
        for sample, key in enumerate(keys):
            if key in places:
                raise DuplicateKey(key, parts=(places[key][0], part))
            places[key] = (part, sample)
    return places


def _no_rows(stored: StoredArray) -> Array:
    return np.empty((0, *stored.row_shape), dtype=stored.dtype)
