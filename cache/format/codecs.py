"""CODECS: the table of codecs, and encoding and decoding by it. Plain floats and integers are here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import permutations
from typing import Literal

import numpy as np

from cache.errors import ArrayMismatch, RefusedValue, SchemaError
from cache.format.codec import Array, Codec, StoredArray, codes_of, too_large
from cache.format.quantised import FixedPointCodec, Int8Codec, SqrtUint8Codec
from cache.format.schema import ArraySpec, Options

_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
_BFLOAT16_INFINITY, _BFLOAT16_NAN = 0x7F80, 0x7FC0
_BFLOAT16_LARGEST = (2 - 2.0**-7) * 2.0**127


class FloatCodec(Codec):
    """Plain IEEE floats. float16: relative 2^-11, absolute 2^-25 below the smallest normal number."""

    def __init__(self, dtype: Literal["float32", "float16"]) -> None:
        self._dtype = dtype

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (codes_of(spec, self._dtype, "bitshuffle", math.nan, is_reserved=True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        with np.errstate(over="ignore"):
            stored = rows.astype(self._dtype)
        if not np.isfinite(stored).all():  # the rows were finite: these overflowed
            raise too_large(rows, float(np.finfo(self._dtype).max), f"use a wider codec than {self._dtype}")
        return {"": stored}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        return stored[""].astype(np.float32)

    def stated_error(self, options: Options) -> str:
        half = "|error| <= 2^-11 |v|, and <= 2^-25 where |v| < 2^-14"
        return half if self._dtype == "float16" else "exact"

    def max_error(self, rows: Array, options: Options) -> Array:
        magnitude = np.abs(rows.astype(np.float64))
        return np.maximum(magnitude * 2.0**-11, 2.0**-25) if self._dtype == "float16" else magnitude * 0


class BFloat16Codec(Codec):
    """uint16 codes that are the upper half of a float32: Zarr has no core type for bfloat16. NaN is never written."""

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (codes_of(spec, "uint16", "bitshuffle", _BFLOAT16_NAN, is_reserved=True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32)
        # To the nearest, of two equally near ones to the even code. A carry into the exponent is right, too.
        codes = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        if (
            (codes & _BFLOAT16_INFINITY) == _BFLOAT16_INFINITY
        ).any():  # the rows were finite: these overflowed
            raise too_large(rows, _BFLOAT16_LARGEST, "use float32")
        return {"": codes}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        bits = stored[""].astype(np.uint32)
        bits <<= 16  # in place: fresh memory costs more than the shift
        return bits.view(np.float32)

    def stated_error(self, options: Options) -> str:
        return "|error| <= 2^-8 |v|, exact for values of bfloat16"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.maximum(
            np.abs(rows.astype(np.float64)) * 2.0**-8, 2.0**-134
        )  # the latter of subnormal numbers


class IntegerCodec(Codec):
    """Exact integers of the option `dtype`; a value that does not fit is refused."""

    takes = "integer"
    options = ("dtype",)

    def check(self, spec: ArraySpec) -> None:
        super().check(spec)
        if spec.options["dtype"] not in _INTEGERS:
            field, expected = f"arrays[{spec.name}].options.dtype", f"one of {', '.join(_INTEGERS)}"
            raise SchemaError(field, expected=expected, found=spec.options["dtype"])

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (codes_of(spec, str(spec.options["dtype"]), "shuffle", 0, is_reserved=False),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        limits = np.iinfo(str(options["dtype"]))
        if rows.size and (int(rows.min()) < limits.min or int(rows.max()) > limits.max):
            raise RefusedValue(
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
    "bfloat16": BFloat16Codec(),
    "integer": IntegerCodec(),
    "fixed_point": FixedPointCodec(),
    "sqrt_uint8": SqrtUint8Codec(),
    "int8": Int8Codec(),
}


def check_specs(specs: Iterable[ArraySpec]) -> None:
    """Raise `SchemaError` for an unknown codec, a wrong option, or two arrays of which one is in the other's path."""
    names: list[str] = []
    for spec in specs:
        if spec.codec not in CODECS:
            raise SchemaError(
                f"arrays[{spec.name}].codec", expected=f"one of {', '.join(CODECS)}", found=spec.codec
            )
        CODECS[spec.codec].check(spec)
        names += [stored.name(spec) for stored in stored_arrays(spec)]
    for first, second in permutations(names, 2):
        if first == second or second.startswith(first + "/"):
            raise SchemaError("arrays", expected="names that share no path", found=[first, second])


def stored_arrays(spec: ArraySpec) -> tuple[StoredArray, ...]:
    """Return the Zarr arrays that an array of the manifest is kept in."""
    return CODECS[spec.codec].stored(spec)


def encode_rows(spec: ArraySpec, rows: Array) -> dict[str, Array]:
    """Return the stored arrays of `rows`, 'rows *row_shape', by suffix.

    Raises `ArrayMismatch` for rows of another shape or kind, `RefusedValue` for values that the codec cannot keep;
    both name the array.
    """
    codec = CODECS[spec.codec]
    _check_rows(spec, rows, takes=codec.takes)
    if codec.takes == "float" and not np.isfinite(rows).all():
        bad = int(rows.size - np.isfinite(rows).sum())
        raise RefusedValue(f"{bad} of {rows.size} values are not finite; reject the sample", array=spec.name)
    try:
        return codec.encode(rows, spec.options)
    except RefusedValue as error:
        raise RefusedValue(error.problem, array=spec.name) from None


def decode_rows(spec: ArraySpec, stored: dict[str, Array]) -> Array:
    """Return what `encode_rows` was given, as float32 or the integer dtype, within the codec's stated error."""
    return CODECS[spec.codec].decode(stored, spec.options)


def holds_fill(stored: StoredArray, codes: Array) -> bool:
    """Return whether `codes` hold the fill value of an array whose codec never writes it."""
    if not stored.fill_is_reserved:
        return False
    if codes.dtype.kind == "f":
        return not bool(np.isfinite(codes).all())
    if codes.size and stored.fill_value == np.iinfo(codes.dtype).min:
        return bool(codes.min() == stored.fill_value)  # many times as fast as comparing each
    return bool((codes == stored.fill_value).any())


def first_fill(stored: StoredArray, codes: Array) -> int:
    """Return the first row of `codes` that holds the fill value; there must be one."""
    is_fill = ~np.isfinite(codes) if codes.dtype.kind == "f" else codes == stored.fill_value
    return int(is_fill.reshape(len(codes), -1).any(axis=1).argmax())


def _check_rows(spec: ArraySpec, rows: Array, *, takes: str) -> None:
    if rows.ndim == 0 or rows.shape[1:] != spec.row_shape:
        raise ArrayMismatch(
            spec.name, expected=f"shape (rows, {spec.row_shape})", found=f"shape {rows.shape}"
        )
    known = ("float16", "float32") if takes == "float" else (*_INTEGERS, "uint64")
    if rows.dtype.name not in known:
        expected = "float16 or float32 values" if takes == "float" else "integers"
        raise ArrayMismatch(spec.name, expected=expected, found=str(rows.dtype))
