"""Strings, numbers and spans as columns: a few bytes each, in a few objects however many there are.

A Python object takes 50 bytes and more, and reading it writes to it (its count of references), so that every forked
process soon has a copy. What is in an array is read without being written to, and stays shared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from cache.format.schema import Span

Integers = NDArray[np.integer[Any]]
T = TypeVar("T", covariant=True)
_DIGEST_BYTES = 32


class Column(Sequence[T]):
    """A sequence whose elements are made when they are asked for; a slice is a tuple of them."""

    @abstractmethod
    def element(self, number: int) -> T:
        """The element at 0 <= number < len."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(map(self.element, range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"element {index} of {len(self)}")
        return self.element(index % len(self))


class Texts(Column[str]):
    """Strings, as UTF-8."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]  # JSON may hold half a character
        self._data = b"".join(encoded)
        self._starts = offsets([len(text) for text in encoded])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def element(self, number: int) -> str:
        start, stop = self._starts[number : number + 2].tolist()
        return self._data[start:stop].decode("utf-8", "surrogatepass")


class _Digests(Column[str]):
    """Digests of 32 bytes, which are 64 letters as hex."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data) // _DIGEST_BYTES

    def element(self, number: int) -> str:
        return self._data[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES].hex()


def digests(texts: Sequence[str]) -> Sequence[str]:
    """Digests in hex as a column, in half of their letters where they are of blake3's length."""
    try:
        data = [bytes.fromhex(text) for text in texts]
    except ValueError:
        return Texts(texts)
    is_packed = all(
        len(of_one) == _DIGEST_BYTES and of_one.hex() == text
        for of_one, text in zip(data, texts, strict=True)
    )
    return _Digests(b"".join(data)) if is_packed else Texts(texts)


class Spans(Column[Span]):
    """Places in tars, each column by itself."""

    def __init__(self, files: Iterable[str], starts: Integers, sizes: Integers) -> None:
        self.files, self.offsets, self.sizes = Texts(files), compact(starts), compact(sizes)

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Spans:
        """Spans as columns."""
        starts, sizes = (
            np.array([getattr(span, name) for span in spans], dtype=np.int64) for name in ("offset", "size")
        )
        return cls((span.file for span in spans), starts, sizes)

    def __len__(self) -> int:
        return len(self.files)

    def element(self, number: int) -> Span:
        return Span(self.files[number], int(self.offsets[number]), int(self.sizes[number]))


def compact(values: Integers) -> Integers:
    """The numbers in 4 bytes each, where they fit."""
    small = np.iinfo(np.uint32)
    fits = not values.size or (int(values.min()) >= small.min and int(values.max()) <= small.max)
    return values.astype(np.uint32) if fits else values


def offsets(counts: Sequence[int]) -> Integers:
    """Where each of some runs of so many elements starts, and at last where the last one ends."""
    return compact(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64))
