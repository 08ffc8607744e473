"""The samples of a data set as columns: a few bytes a sample, which forked workers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache import SampleEntry, Store

Row = tuple[str, SampleEntry]  # a part, and one of its samples


class Rows:
    """Where each sample lies: the store whose index describes it, its part and its number there.

    `lacks` says which stores do not hold it. A row is read from its store's index when it is asked for.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        parts: Sequence[str],
        places: NDArray[np.uint32],  # 'R 3': numbers of a store, a part and a sample
        lacks: NDArray[np.bool_],  # 'R store'; 'R 0' of one store alone
    ) -> None:
        self.stores, self.parts = tuple(stores), tuple(parts)
        self.places, self.lacks = places, lacks

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Row:
        store, part, sample = self.places[number].tolist()
        return self.parts[part], self.stores[store].entry(self.parts[part], sample)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        """Return the chosen rows."""
        return Rows(self.stores, self.parts, self.places[chosen], self.lacks[chosen])
