"""Codecs that keep fewer bits than a float, each within an error that it states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cache.errors import SchemaError, ValueOutOfRange
from cache.format.codec import Array, StoredArray, check_options, refuse_option, too_large
from cache.format.schema import ArraySpec, Options


@dataclass(frozen=True)
class FixedPointCodec:
    """int16 multiples of the option `step`, a power of two, so that decoding is exact; -32768 is reserved."""

    takes: Literal["float", "integer"] = "float"
    reserved: int = -32768
    largest: int = 32767

    def check(self, spec: ArraySpec) -> None:
        check_options(spec, known=("step",))
        step = spec.options["step"]
        # 2^-100 .. 2^100 keeps every code * step a normal float32.
        if isinstance(step, str) or not 2.0**-100 <= step <= 2.0**100 or math.frexp(step)[0] != 0.5:
            refuse_option(spec, "step", expected="a power of two, such as 0.0078125")

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (StoredArray("", "int16", spec.row_shape, "bitshuffle", self.reserved, True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        step = float(options["step"])
        with np.errstate(over="ignore"):
            codes = np.rint(rows.astype(np.float32) / np.float32(step))
        if (np.abs(codes) > self.largest).any():
            raise ValueOutOfRange(too_large(rows, self.largest * step, "use a larger step or float16"))
        return {"": codes.astype(np.int16)}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        values = stored[""].astype(np.float32)
        values *= np.float32(options["step"])  # in place: fresh memory costs more than the product
        return values

    def stated_error(self, options: Options) -> str:
        return f"|error| <= {float(options['step']) / 2:g} (step {float(options['step']):g} / 2)"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.full(rows.shape, float(options["step"]) / 2)


@dataclass(frozen=True)
class SqrtUint8Codec:
    """uint8 codes of sqrt(v / scale), scale the row's largest value over the last axis: for probabilities."""

    takes: Literal["float", "integer"] = "float"

    def check(self, spec: ArraySpec) -> None:
        check_options(spec, known=())
        _check_scaled(spec)

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (
            StoredArray("", "uint8", spec.row_shape, "bitshuffle", 0, False),
            StoredArray("scale", "float16", spec.row_shape[:-1], "bitshuffle", math.nan, True),
        )

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        if rows.size and rows.min() < 0:
            raise ValueOutOfRange(f"value {rows.min():g} is negative; sqrt_uint8 keeps values >= 0 only")
        scale = _scale(rows)
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
        codes = np.rint(255 * np.sqrt(rows.astype(np.float32) / divisor))
        return {"": codes.astype(np.uint8), "scale": scale}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        values = stored[""].astype(np.float32)
        values /= np.float32(255)
        values *= values * stored["scale"].astype(np.float32)[..., None]
        return values

    def stated_error(self, options: Options) -> str:
        return (
            "|error| <= sqrt(v s)/255 + s/510^2 + 1e-6 s, s = the row's largest value rounded up to float16"
        )

    def max_error(self, rows: Array, options: Options) -> Array:
        # u = sqrt(v/s) is off by |d| <= 1/510: s((u+d)^2 - u^2) = s(2ud + d^2); 1e-6 s is float32 arithmetic.
        scale = _scale(rows).astype(np.float64)[..., None]
        return np.sqrt(rows.astype(np.float64) * scale) / 255 + scale / 510**2 + 1e-6 * scale


@dataclass(frozen=True)
class Int8Codec:
    """int8 codes of v / scale, scale the largest |value| over the last axis: for features; -128 is reserved."""

    takes: Literal["float", "integer"] = "float"
    reserved: int = -128
    largest: int = 127

    def check(self, spec: ArraySpec) -> None:
        check_options(spec, known=())
        _check_scaled(spec)

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (
            StoredArray("", "int8", spec.row_shape, "bitshuffle", self.reserved, True),
            StoredArray("scale", "float16", spec.row_shape[:-1], "bitshuffle", math.nan, True),
        )

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        scale = _scale(np.abs(rows))
        divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
        codes = np.rint(rows.astype(np.float32) / divisor * self.largest)
        return {"": codes.astype(np.int8), "scale": scale}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        fraction = stored[""].astype(np.float32) / np.float32(self.largest)
        return stored["scale"].astype(np.float32)[..., None] * fraction

    def stated_error(self, options: Options) -> str:
        return "|error| <= s/254 + 1e-6 s, s = the row's largest |value| rounded up to float16"

    def max_error(self, rows: Array, options: Options) -> Array:
        scale = _scale(np.abs(rows)).astype(np.float64)[..., None]
        return np.broadcast_to(scale / 254 + 1e-6 * scale, rows.shape)


def _check_scaled(spec: ArraySpec) -> None:
    if not spec.row_shape:
        expected = f"at least one axis for codec {spec.codec} to scale over"
        raise SchemaError(f"arrays[{spec.name}].row_shape", expected=expected, found=spec.row_shape)


def _scale(magnitudes: Array) -> Array:
    """float16 over the last axis, never below the largest value: rounded to nearest, codes could pass their range."""
    largest = magnitudes.max(axis=-1).astype(np.float32)
    with np.errstate(over="ignore"):
        scale = largest.astype(np.float16)
        above: Array = np.nextafter(scale, np.float16(np.inf))
        scale = np.where(scale.astype(np.float32) < largest, above, scale)
    if not np.isfinite(scale).all():
        limit = float(np.finfo(np.float16).max)
        raise ValueOutOfRange(too_large(magnitudes, limit, "use float32 or scale it down"))
    return scale
