"""What a codec is: which arrays it stores, what it refuses, and the error bound that it states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from cache.errors import RefusedValue, SchemaError
from cache.format.schema import ArraySpec, Options

Array = NDArray[Any]
Shuffle = Literal["shuffle", "bitshuffle"]


@dataclass(frozen=True)
class StoredArray:
    """One Zarr array that a codec needs: '<name>' if `suffix` is empty, '<name>_<suffix>' else."""

    suffix: str
    dtype: str
    row_shape: tuple[int, ...]
    shuffle: Shuffle
    fill_value: float | int
    fill_is_reserved: bool  # the codec never writes fill_value, so finding it means that something is missing
    is_flat: bool = (
        False  # of a ragged array: its elements, block after block, on one axis; `row_shape` is empty
    )

    def name(self, spec: ArraySpec) -> str:
        return f"{spec.name}_{self.suffix}" if self.suffix else spec.name


def codes_of(
    spec: ArraySpec, dtype: str, shuffle: Shuffle, fill: float | int, *, is_reserved: bool
) -> StoredArray:
    """Return the stored array with a code for each value."""
    row_shape = () if spec.is_ragged else spec.shape_of(0)
    return StoredArray("", dtype, row_shape, shuffle, fill, is_reserved, is_flat=spec.is_ragged)


class Codec(ABC):
    """How rows of numbers, 'rows *row_shape', become stored arrays by suffix, and come back.

    Codecs have no state. `encode` raises `RefusedValue` for a value that it cannot keep; it never clips.
    """

    takes: ClassVar[Literal["float", "integer"]] = "float"
    options: ClassVar[tuple[str, ...]] = ()  # names, all required

    def check(self, spec: ArraySpec) -> None:
        """Raise `SchemaError` unless the spec has the options of this codec, and values that it knows."""
        if set(spec.options) != set(self.options):
            expected = f"{', '.join(self.options) or 'no options'} for codec {spec.codec}"
            raise SchemaError(f"arrays[{spec.name}].options", expected=expected, found=dict(spec.options))

    @abstractmethod
    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        """Return the arrays that rows of this spec are kept in."""

    @abstractmethod
    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        """Return the stored arrays by suffix, of finite rows whose shape fits the spec."""

    @abstractmethod
    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        """Return the rows as float32, or as integers. The result may be written to: the codes may not."""

    @abstractmethod
    def stated_error(self, options: Options) -> str:
        """Return the formula of the largest error, for people."""

    @abstractmethod
    def max_error(self, rows: Array, options: Options) -> Array:
        """Return the largest error that each value may have, float64 of the shape of `rows`."""


def too_large(rows: Array, limit: float, remedy: str) -> RefusedValue:
    """Return the error for a value that a codec has no room for."""
    return RefusedValue(f"value {np.abs(rows).max():g} is beyond {limit:g}; {remedy}")
