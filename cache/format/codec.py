"""What a codec is: which arrays it stores, what it refuses, and the error that it states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.errors import SchemaError
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

    def name(self, spec: ArraySpec) -> str:
        return f"{spec.name}_{self.suffix}" if self.suffix else spec.name


class Codec(Protocol):
    """Pure functions of rows and options; `encode` refuses a value rather than clip it."""

    @property
    def takes(self) -> Literal["float", "integer"]: ...
    def check(self, spec: ArraySpec) -> None: ...
    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]: ...
    def encode(self, rows: Array, options: Options) -> dict[str, Array]: ...
    def decode(self, stored: dict[str, Array], options: Options) -> Array: ...
    def stated_error(self, options: Options) -> str: ...
    def max_error(self, rows: Array, options: Options) -> Array: ...


def check_options(spec: ArraySpec, *, known: tuple[str, ...]) -> None:
    """SchemaError unless the spec has exactly these options."""
    if set(spec.options) != set(known):
        wanted = ", ".join(known) or "no options"
        field = f"arrays[{spec.name}].options"
        raise SchemaError(field, expected=f"{wanted} for codec {spec.codec}", found=dict(spec.options))


def refuse_option(spec: ArraySpec, name: str, *, expected: str) -> None:
    """SchemaError naming the option of a spec, and what it may be."""
    raise SchemaError(f"arrays[{spec.name}].options.{name}", expected=expected, found=spec.options[name])


def too_large(rows: Array, limit: float, remedy: str) -> str:
    """The sentence for a value that a codec has no room for."""
    return f"value {np.abs(rows).max():g} is beyond {limit:g}; {remedy}"
