"""Which part holds a sample key: a key occurs once in a store, because stage 2 joins by key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from cache.errors import CacheError
from cache.index import read_part_index
from cache.layout import part_path, parts_path
from cache.records import PartRecord, read_part_record
from cache.schema import Manifest


class TakenKeys:
    """The keys of the finished parts of a store, read part by part as other writers publish them.

    A part counts only if it is done: what cannot be read, or is damaged, holds no key against a sample. `counts`
    leaves out parts that are to be replaced.
    """

    def __init__(self, store: Path, manifest: Manifest, *, counts: Callable[[PartRecord], bool]) -> None:
        self._store, self._manifest, self._counts = store, manifest, counts
        self._part_of: dict[str, str] = {}
        self._known: set[str] = set()
        self._coming: dict[str, frozenset[str]] = {}  # by part

    def refresh(self) -> None:
        """Read the indexes of parts published since the last time."""
        for name in sorted(set(os.listdir(parts_path(self._store))) - self._known):
            if self._is_done(name):
                index = read_part_index(part_path(self._store, name), self._manifest)
                self._part_of |= dict.fromkeys(index.keys, name)
                self._known.add(name)
                self._coming.pop(name, None)

    def expect(self, part: str, keys: Iterable[str]) -> None:
        """Count keys as the part's before it is published; a part that is published meanwhile goes before it."""
        self._coming[part] = frozenset(keys)

    def other_part(self, key: str, *, than: str) -> str | None:
        """The part that holds the key, or will; None if none does, or only the part `than` itself."""
        holders = [name for name, keys in self._coming.items() if key in keys]
        if key in self._part_of:
            holders.insert(0, self._part_of[key])
        return next((name for name in holders if name != than), None)

    def _is_done(self, name: str) -> bool:
        try:
            record = read_part_record(part_path(self._store, name), contents=self._manifest.contents_digest())
        except CacheError:
            return False
        return self._counts(record)
