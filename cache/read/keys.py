"""Where a sample lies in a store, by its key: exact, for 12 bytes a sample beside the keys themselves."""

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
    """Part and place of every key: hashes in order, searched by halves, and compared with the key that lies there.

    Raises `DuplicateKey` if two samples share a key. `hash_key` is Python's, which is of this process and its forks.
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
        self._check_duplicates()

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[str]:
        """Every key, part by part, in stored order."""
        return chain.from_iterable(keys for _, keys in self._parts)

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """Of each key its part and place; None if no sample has it."""
        hashes = self._hashed(keys, len(keys))
        found = zip(keys, hashes.tolist(), self._hashes.searchsorted(hashes).tolist(), strict=True)
        return list(starmap(self._find, found))

    def _find(self, key: str, hashed: int, at: int) -> Found | None:
        while at < len(self._hashes) and self._hashes[at] == hashed:
            part, sample = self._place(int(self._numbers[at]))
            if self._parts[part][1][sample] == key:
                return self._parts[part][0], sample
            at += 1
        return None

    def _hashed(self, keys: Iterable[str], count: int) -> NDArray[np.int64]:
        return np.fromiter(map(self._hash_key, keys), dtype=np.int64, count=count)

    def _place(self, number: int) -> tuple[int, int]:
        part = bisect_right(self._starts, number) - 1
        return part, number - self._starts[part]

    def _check_duplicates(self) -> None:
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        first: dict[str, str] = {}
        for number in np.unique(self._numbers[np.concatenate([same, same + 1])]).tolist():
            part, sample = self._place(number)
            name, keys = self._parts[part]
            if keys[sample] in first:
                raise DuplicateKey(keys[sample], parts=(first[keys[sample]], name))
            first[keys[sample]] = name
