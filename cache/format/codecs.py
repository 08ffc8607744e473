"""CODECS: how rows of numbers become stored arrays and come back, each with the error it states."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cache.errors import ArrayMismatch, NonFiniteValue, RefusedValue, SchemaError, ValueOutOfRange
from cache.format.codec import Array, Codec, StoredArray, check_options, refuse_option, too_large
from cache.format.quantised import FixedPointCodec, Int8Codec, SqrtUint8Codec
from cache.format.schema import ArraySpec, Options


@dataclass(frozen=True)
class FloatCodec:
    """Plain IEEE floats. float16: relative 2^-11, absolute 2^-25 below the smallest normal number."""

    dtype: Literal["float32", "float16"]
    takes: Literal["float", "integer"] = "float"

    def check(self, spec: ArraySpec) -> None:
        check_options(spec, known=())

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (StoredArray("", self.dtype, spec.row_shape, "bitshuffle", math.nan, True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        with np.errstate(over="ignore"):
            stored = rows.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ValueOutOfRange(
                too_large(rows, float(np.finfo(self.dtype).max), f"use a wider codec than {self.dtype}")
            )
        return {"": stored}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        return stored[""].astype(np.float32)

    def stated_error(self, options: Options) -> str:
        half = "|error| <= 2^-11 |v|, and <= 2^-25 where |v| < 2^-14"
        return half if self.dtype == "float16" else "exact"

    def max_error(self, rows: Array, options: Options) -> Array:
        magnitude = np.abs(rows.astype(np.float64))
        return np.maximum(magnitude * 2.0**-11, 2.0**-25) if self.dtype == "float16" else magnitude * 0


@dataclass(frozen=True)
class IntegerCodec:
    """Exact integers of the option `dtype`; a value that does not fit is refused."""

    takes: Literal["float", "integer"] = "integer"
    dtypes: tuple[str, ...] = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")

    def check(self, spec: ArraySpec) -> None:
        check_options(spec, known=("dtype",))
        if spec.options["dtype"] not in self.dtypes:
            refuse_option(spec, "dtype", expected=f"one of {', '.join(self.dtypes)}")

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        dtype = str(spec.options["dtype"])
        return (StoredArray("", dtype, spec.row_shape, "shuffle", 0, False),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        limits = np.iinfo(str(options["dtype"]))
        if rows.size and (int(rows.min()) < limits.min or int(rows.max()) > limits.max):
            raise ValueOutOfRange(
                f"values {rows.min()}..{rows.max()} do not fit {options['dtype']}; use a wider dtype"
            )
        return {"": rows.astype(str(options["dtype"]))}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        return stored[""].copy()

    def stated_error(self, options: Options) -> str:
        return f"exact ({options['dtype']})"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.zeros(rows.shape)


CODECS: dict[str, Codec] = {
    "float32": FloatCodec("float32"),
    "float16": FloatCodec("float16"),
    "integer": IntegerCodec(),
    "fixed_point": FixedPointCodec(),
    "sqrt_uint8": SqrtUint8Codec(),
    "int8": Int8Codec(),
}


def check_specs(specs: Iterable[ArraySpec]) -> None:
    """Every codec known, every option valid, no two arrays on one path or one inside the other."""
    names: list[str] = []
    for spec in specs:
        if spec.codec not in CODECS:
            raise SchemaError(
                f"arrays[{spec.name}].codec", expected=f"one of {', '.join(CODECS)}", found=spec.codec
            )
        CODECS[spec.codec].check(spec)
        names += [stored.name(spec) for stored in stored_arrays(spec)]
    for first, second in ((a, b) for i, a in enumerate(names) for j, b in enumerate(names) if i != j):
        if first == second or second.startswith(first + "/"):
            raise SchemaError("arrays", expected="names that share no path", found=[first, second])


def stored_arrays(spec: ArraySpec) -> tuple[StoredArray, ...]:
    """The Zarr arrays that an array of the manifest is kept in."""
    return CODECS[spec.codec].stored(spec)


def encode_rows(spec: ArraySpec, rows: Array) -> dict[str, Array]:
    """The stored arrays of `rows` by suffix; RefusedValue or ArrayMismatch naming the array if not."""
    codec = CODECS[spec.codec]
    _check_rows(spec, rows, takes=codec.takes)
    if codec.takes == "float" and not np.isfinite(rows).all():
        bad = int(rows.size - np.isfinite(rows).sum())
        raise NonFiniteValue(
            f"{bad} of {rows.size} values are not finite; reject the sample", array=spec.name
        )
    try:
        return codec.encode(rows, spec.options)
    except RefusedValue as error:
        raise error.named(spec.name) from None


def decode_rows(spec: ArraySpec, stored: dict[str, Array]) -> Array:
    """float32, or the integer dtype: what `encode_rows` was given, within the codec's stated error."""
    return CODECS[spec.codec].decode(stored, spec.options)


def holds_fill(stored: StoredArray, codes: Array) -> bool:
    """True if `codes` hold the fill value of an array whose codec never writes it."""
    if not stored.fill_is_reserved:
        return False
    if codes.dtype.kind == "f":
        return not bool(np.isfinite(codes).all())
    if codes.size and stored.fill_value == np.iinfo(codes.dtype).min:
        return bool(codes.min() == stored.fill_value)  # many times as fast as to compare each
    return bool((codes == stored.fill_value).any())


def _check_rows(spec: ArraySpec, rows: Array, *, takes: str) -> None:
    if rows.ndim == 0 or rows.shape[1:] != spec.row_shape:
        raise ArrayMismatch(
            spec.name, expected=f"shape (rows, {spec.row_shape})", found=f"shape {rows.shape}"
        )
    known = ("f2", "f4") if takes == "float" else ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
    if rows.dtype.str[1:] not in known:
        expected = "float16 or float32 values" if takes == "float" else "integers"
        raise ArrayMismatch(spec.name, expected=expected, found=str(rows.dtype))
