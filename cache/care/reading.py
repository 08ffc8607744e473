"""How far a deep verification has read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from cache.format.layout import PARTS

_CHUNKS = "/c/"  # in the name of a file of an array's values, which is hashed and then decoded


class Reading:
    """Bytes of parts that were read, and those to read: every file once, an array's values once more."""

    def __init__(
        self, sizes: Mapping[str, int], parts: Collection[str], progress: Callable[[int, int], object]
    ) -> None:
        folders = tuple(f"{PARTS}/{name}/" for name in parts)
        of_parts = {name: size for name, size in sizes.items() if name.startswith(folders)}
        self.total = sum(size * (2 if _CHUNKS in name else 1) for name, size in of_parts.items())
        self.done, self.progress = 0, progress
        progress(0, self.total)

    def advance(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self.done = min(self.done + num_bytes, self.total)  # a writer may make files larger meanwhile
        self.progress(self.done, self.total)

    def end(self) -> None:
        """Count what needed no reading, because it is damaged, as read."""
        self.advance(self.total - self.done)
