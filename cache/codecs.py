"""CODECS: how rows of numbers become stored arrays and come back, each with the error it states."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cache.errors import ArrayMismatch, NonFiniteValue, RefusedValue, SchemaError, ValueOutOfRange
from cache.schema import ArraySpec, Options

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


@dataclass(frozen=True)
class FloatCodec:
    """Plain IEEE floats. float16: relative 2^-11, absolute 2^-25 below the smallest normal number."""

    dtype: Literal["float32", "float16"]
    takes: Literal["float", "integer"] = "float"

    def check(self, spec: ArraySpec) -> None:
        _check_options(spec, known=())

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (StoredArray("", self.dtype, spec.row_shape, "bitshuffle", math.nan, True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        with np.errstate(over="ignore"):
            stored = rows.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ValueOutOfRange(
                _too_large(rows, float(np.finfo(self.dtype).max), f"use a wider codec than {self.dtype}")
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
        _check_options(spec, known=("dtype",))
        if spec.options["dtype"] not in self.dtypes:
            _refuse_option(spec, "dtype", expected=f"one of {', '.join(self.dtypes)}")

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
        return stored[""]

    def stated_error(self, options: Options) -> str:
        return f"exact ({options['dtype']})"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.zeros(rows.shape)


@dataclass(frozen=True)
class FixedPointCodec:
    """int16 multiples of the option `step`, a power of two, so that decoding is exact; -32768 is reserved."""

    takes: Literal["float", "integer"] = "float"
    reserved: int = -32768
    largest: int = 32767

    def check(self, spec: ArraySpec) -> None:
        _check_options(spec, known=("step",))
        step = spec.options["step"]
        # 2^-100 .. 2^100 keeps every code * step a normal float32.
        if isinstance(step, str) or not 2.0**-100 <= step <= 2.0**100 or math.frexp(step)[0] != 0.5:
            _refuse_option(spec, "step", expected="a power of two, such as 0.0078125")

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (StoredArray("", "int16", spec.row_shape, "bitshuffle", self.reserved, True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        step = float(options["step"])
        with np.errstate(over="ignore"):
            codes = np.rint(rows.astype(np.float32) / np.float32(step))
        if (np.abs(codes) > self.largest).any():
            raise ValueOutOfRange(_too_large(rows, self.largest * step, "use a larger step or float16"))
        return {"": codes.astype(np.int16)}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        return stored[""].astype(np.float32) * np.float32(options["step"])

    def stated_error(self, options: Options) -> str:
        return f"|error| <= {float(options['step']) / 2:g} (step {float(options['step']):g} / 2)"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.full(rows.shape, float(options["step"]) / 2)


@dataclass(frozen=True)
class SqrtUint8Codec:
    """uint8 codes of sqrt(v / scale), scale the row's largest value over the last axis: for probabilities."""

    takes: Literal["float", "integer"] = "float"

    def check(self, spec: ArraySpec) -> None:
        _check_options(spec, known=())
        if not spec.row_shape:
            expected = "at least one axis for codec sqrt_uint8 to scale over"
            raise SchemaError(f"arrays[{spec.name}].row_shape", expected=expected, found=spec.row_shape)

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (
            StoredArray("", "uint8", spec.row_shape, "bitshuffle", 0, False),
            StoredArray("scale", "float16", spec.row_shape[:-1], "bitshuffle", math.nan, True),
        )

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        if rows.size and rows.min() < 0:
            raise ValueOutOfRange(f"value {rows.min():g} is negative; sqrt_uint8 keeps values >= 0 only")
        scale = self._scale(rows)
        if not np.isfinite(scale).all():
            raise ValueOutOfRange(
                _too_large(rows, float(np.finfo(np.float16).max), "use float32 or scale it down")
            )
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
        codes = np.rint(255 * np.sqrt(rows.astype(np.float32) / divisor))
        return {"": codes.astype(np.uint8), "scale": scale}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        fraction = stored[""].astype(np.float32) / np.float32(255)
        return stored["scale"].astype(np.float32)[..., None] * fraction * fraction

    def stated_error(self, options: Options) -> str:
        return (
            "|error| <= sqrt(v s)/255 + s/510^2 + 1e-6 s, s = the row's largest value rounded up to float16"
        )

    def max_error(self, rows: Array, options: Options) -> Array:
        # u = sqrt(v/s) is off by |d| <= 1/510: s((u+d)^2 - u^2) = s(2ud + d^2); 1e-6 s is float32 arithmetic.
        scale = self._scale(rows).astype(np.float64)[..., None]
        return np.sqrt(rows.astype(np.float64) * scale) / 255 + scale / 510**2 + 1e-6 * scale

    @staticmethod
    def _scale(rows: Array) -> Array:
        """float16, never below the largest value: rounded to nearest, codes could pass 255."""
        largest = rows.max(axis=-1).astype(np.float32)
        with np.errstate(over="ignore"):
            scale = largest.astype(np.float16)
            above: Array = np.nextafter(scale, np.float16(np.inf))
            return np.where(scale.astype(np.float32) < largest, above, scale)


CODECS: dict[str, Codec] = {
    "float32": FloatCodec("float32"),
    "float16": FloatCodec("float16"),
    "integer": IntegerCodec(),
    "fixed_point": FixedPointCodec(),
    "sqrt_uint8": SqrtUint8Codec(),
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


def _check_options(spec: ArraySpec, *, known: tuple[str, ...]) -> None:
    if set(spec.options) != set(known):
        wanted = ", ".join(known) or "no options"
        field = f"arrays[{spec.name}].options"
        raise SchemaError(field, expected=f"{wanted} for codec {spec.codec}", found=dict(spec.options))


def _refuse_option(spec: ArraySpec, name: str, *, expected: str) -> None:
    raise SchemaError(f"arrays[{spec.name}].options.{name}", expected=expected, found=spec.options[name])


def _too_large(rows: Array, limit: float, remedy: str) -> str:
    return f"value {np.abs(rows).max():g} is beyond {limit:g}; {remedy}"
