"""Finds a sample in a store by its key: exactly, with 12 bytes a sample beside the keys themselves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, starmap

import numpy as np
from numpy.typing import NDArray

from cache.errors import DuplicateKey
from cache.format.columns import compact

Found = tuple[str, int]  # a part, and the number of a sample in it


class KeyTable:
    """Sorted hashes of all keys (8 bytes each) and the samples that they are of (4 bytes each), without collisions.

    `hash_key` is Python's own, which differs between processes but not between a process and its forks.
    """

    def __init__(
        self, parts: Iterable[tuple[str, Sequence[str]]], *, hash_key: Callable[[str], int] = hash
    ) -> None:
        self._parts = list(parts)
        self._starts = [0, *accumulate(len(keys) for _, keys in self._parts)]
        self._hash_key = hash_key
        hashes = self._hashed(self, len(self))
        order = hashes.argsort(kind="stable")
        self._hashes, self._numbers = hashes[order], compact(order)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        """Every key, part by part, in stored order."""
        return chain.from_iterable(keys for _, keys in self._parts)

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """Return of each key its part and sample number; None if no sample has it."""
        hashes = self._hashed(keys, len(keys))
        found = zip(keys, hashes.tolist(), self._hashes.searchsorted(hashes).tolist(), strict=True)
        return list(starmap(self._find, found))

    def _find(self, key: str, hashed: int, at: int) -> Found | None:
        # Different keys may share a hash: look at all of them.
        while at < len(self._hashes) and self._hashes[at] == hashed:
            part, sample, found = self._sample(int(self._numbers[at]))
            if found == key:
                return part, sample
            at += 1
        return None

    def _hashed(self, keys: Iterable[str], count: int) -> NDArray[np.int64]:
        return np.fromiter(map(self._hash_key, keys), dtype=np.int64, count=count)

    def _sample(self, number: int) -> tuple[str, int, str]:
        """Return part, number in the part, and key of a sample by its number in the store."""
        at = bisect_right(self._starts, number) - 1
        part, keys = self._parts[at]
        sample = number - self._starts[at]
        return part, sample, keys[sample]

    def check_duplicates(self) -> None:
        """Raise `DuplicateKey` if two samples share a key."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        first: dict[str, str] = {}
        for number in np.unique(self._numbers[np.concatenate([same, same + 1])]).tolist():
            part, _, key = self._sample(number)
            if key in first:
                raise DuplicateKey(key, parts=(first[key], part))
            first[key] = part
