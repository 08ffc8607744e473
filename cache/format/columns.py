"""Columns: sequences of strings, spans and numbers in a few bytes an element and a few objects in all.

A Python object takes 50 bytes or more. Reading it also writes to it (its reference count), so every forked process
soon has a copy of its own. The contents of an array are read without a write, and stay shared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, InstanceOf, PlainSerializer, Strict

from cache.format.schema import Span

Integers = NDArray[np.integer[Any]]
T = TypeVar("T", covariant=True)
_DIGEST_BYTES = 32


class Column(Sequence[T]):
    """A sequence that makes an element when it is asked for; a slice is a tuple of elements."""

    @abstractmethod
    def element(self, number: int) -> T:
        """Return the element at 0 <= number < len."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        numbers = range(len(self))[index]  # raises IndexError, and resolves what is negative
        return self.element(numbers) if isinstance(numbers, int) else tuple(map(self.element, numbers))


class Texts(Column[str]):
    """Strings, as UTF-8."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [
            text.encode("utf-8", "surrogatepass") for text in texts
        ]  # JSON may hold half a surrogate pair
        self._data = b"".join(encoded)
        self._starts = offsets([len(text) for text in encoded])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def element(self, number: int) -> str:
        start, stop = self._starts[number : number + 2].tolist()
        return self._data[start:stop].decode("utf-8", "surrogatepass")


class _Digests(Column[str]):
    """Hex digests of 64 letters, as 32 bytes each."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data) // _DIGEST_BYTES

    def element(self, number: int) -> str:
        return self._data[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES].hex()


def digests(texts: Sequence[str]) -> Sequence[str]:
    """Return hex digests as a column: in 32 bytes each where all are of blake3's length and in lower case."""
    try:
        packed = _Digests(b"".join(map(bytes.fromhex, texts)))
    except ValueError:
        return Texts(texts)
    # `fromhex` also takes upper case and spaces, which must come back as they were.
    return packed if list(packed) == list(texts) else Texts(texts)


def compact(values: Integers) -> Integers:
    """Return the numbers in 4 bytes each, if they fit."""
    small = np.iinfo(np.uint32)
    fits = not values.size or (int(values.min()) >= small.min and int(values.max()) <= small.max)
    return values.astype(np.uint32) if fits else values


def integers(values: Sequence[int]) -> Integers:
    """Return a column of numbers below 2^63."""
    return compact(np.array(values, dtype=np.int64))


def offsets(counts: Sequence[int]) -> Integers:
    """Return where each of consecutive runs of these lengths starts, and at last where the last one ends."""
    return compact(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64))


if TYPE_CHECKING:
    Strings = Digests = Sequence[str]
    Numbers = Integers
else:
    # How columns are read from JSON and written to it. `InstanceOf`: a key may hold half a surrogate pair, which a
    # plain `str` field may refuse. `fail_fast`: there may be millions of wrong elements.
    _FIRST = Field(fail_fast=True)
    _Strings = list[InstanceOf[str]]
    _Int64 = Annotated[int, Strict(), Field(ge=-(2**63), lt=2**63)]
    Strings = Annotated[_Strings, _FIRST, AfterValidator(Texts), PlainSerializer(list)]
    Digests = Annotated[_Strings, _FIRST, AfterValidator(digests), PlainSerializer(list)]
    Numbers = Annotated[
        list[_Int64], _FIRST, AfterValidator(integers), PlainSerializer(lambda column: column.tolist())
    ]


@dataclass(eq=False)
class Spans(Column[Span]):
    """Spans in tars, a column for each field."""

    file: Strings
    offset: Numbers
    size: Numbers

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Spans:
        """Return spans as columns."""
        starts, sizes = [span.offset for span in spans], [span.size for span in spans]
        return cls(Texts(span.file for span in spans), integers(starts), integers(sizes))

    def __len__(self) -> int:
        return len(self.file)

    def element(self, number: int) -> Span:
        return Span(self.file[number], int(self.offset[number]), int(self.size[number]))
