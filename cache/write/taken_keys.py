"""Which part holds a sample key: a key occurs once in a store, because stage 2 joins by key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cache.errors import CorruptPart, DuplicateKey, UnreadableFile
from cache.files.local_files import is_there
from cache.format.documents import read_document
from cache.format.index import read_part_index
from cache.format.layout import MANIFEST, PART_RECORD, part_path
from cache.format.records import read_part_record
from cache.format.schema import Manifest


class TakenKeys:
    """The keys of a store's parts, read part by part as other writers publish them.

    The keys are those of a part's index, even if its done-mark is damaged or cannot be read: they are taken until the
    part is replaced. `counts` is False for the names of parts that are to be replaced.
    """

    def __init__(self, store: Path, manifest: Manifest, *, counts: Callable[[str], bool]) -> None:
        self._store, self._manifest, self._counts = store, manifest, counts
        self._part_of: dict[str, str] = {}
        self._known: set[str] = set()
        self._coming: dict[str, frozenset[str]] = {}  # by part
        self._shared: DuplicateKey | None = None

    def refresh(self) -> None:
        """Read the indexes of parts published since the last time.

        Raises `CorruptPart` or `UnreadableFile` for an index that cannot be read, as any key may be in it.
        """
        planned = Manifest.from_json(read_document(self._store / MANIFEST)).planned_parts
        for name in planned:
            folder = part_path(self._store, name)
            if name not in self._known and is_there(folder / PART_RECORD) and self._counts(name):
                self._take(name, folder)

    def expect(self, part: str, keys: Iterable[str]) -> None:
        """Count keys as the part's before it is published. Keys that are published by then come first."""
        self._coming[part] = frozenset(keys)

    def other_part(self, key: str, *, than: str) -> str | None:
        """Return the part that holds the key, or will; None if none does, or only the part `than`."""
        published = [self._part_of[key]] if key in self._part_of else []
        holders = published + [name for name, keys in list(self._coming.items()) if key in keys]
        return next((name for name in holders if name != than), None)

    def check(self) -> None:
        """Raise `DuplicateKey` if two published parts hold one key."""
        self.refresh()
        if self._shared:
            raise self._shared

    def _take(self, name: str, folder: Path) -> None:
        for key in read_part_index(folder, self._manifest).keys:
            other = self._part_of.setdefault(key, name)
            if other != name and not self._shared:
                self._shared = DuplicateKey(key, parts=(other, name))
        self._coming.pop(name, None)
        try:
            read_part_record(folder)
        except (CorruptPart, UnreadableFile):
            return  # not known: the part may be replaced, and is read again next time
        self._known.add(name)
