"""Codecs that keep fewer bits than a float, each within an error bound that it states."""

from __future__ import annotations

import math

import numpy as np

from cache.errors import RefusedValue, SchemaError
from cache.format.codec import Array, Codec, StoredArray, codes_of, too_large
from cache.format.schema import ArraySpec, Options


class FixedPointCodec(Codec):
    """int16 multiples of the option `step`, a power of two, so that decoding is exact; -32768 is never written."""

    options = ("step",)

    def check(self, spec: ArraySpec) -> None:
        super().check(spec)
        step = spec.options["step"]
        # frexp gives 0.5 for powers of two only; 2^-100 .. 2^100 keeps every code * step a normal float32.
        if isinstance(step, str) or not 2.0**-100 <= step <= 2.0**100 or math.frexp(step)[0] != 0.5:
            field = f"arrays[{spec.name}].options.step"
            raise SchemaError(field, expected="a power of two, such as 0.0078125", found=step)

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return (codes_of(spec, "int16", "bitshuffle", -32768, is_reserved=True),)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        step = float(options["step"])
        with np.errstate(over="ignore"):
            codes = np.rint(rows.astype(np.float32) / np.float32(step))
        if (np.abs(codes) > 32767).any():
            raise too_large(rows, 32767 * step, "use a larger step or float16")
        return {"": codes.astype(np.int16)}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        values = stored[""].astype(np.float32)
        values *= np.float32(options["step"])  # in place: fresh memory costs more than the product
        return values

    def stated_error(self, options: Options) -> str:
        return f"|error| <= {float(options['step']) / 2:g} (step {float(options['step']):g} / 2)"

    def max_error(self, rows: Array, options: Options) -> Array:
        return np.full(rows.shape, float(options["step"]) / 2)


class _ScaledCodec(Codec):
    """Codes of 8 bits of v / scale, where scale is the largest |value| over the last axis, rounded up to float16."""

    def check(self, spec: ArraySpec) -> None:
        super().check(spec)
        if not spec.row_shape:
            expected = f"at least one axis for codec {spec.codec} to scale over"
            raise SchemaError(f"arrays[{spec.name}].row_shape", expected=expected, found=spec.row_shape)

    def _stored(self, spec: ArraySpec, dtype: str, fill: int, is_reserved: bool) -> tuple[StoredArray, ...]:
        return (
            codes_of(spec, dtype, "bitshuffle", fill, is_reserved=is_reserved),
            StoredArray("scale", "float16", spec.leading, "bitshuffle", math.nan, True),
        )


class SqrtUint8Codec(_ScaledCodec):
    """uint8 codes of sqrt(v / scale), for probabilities: a plain step would round small ones to 0."""

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return self._stored(spec, "uint8", 0, False)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        if rows.size and rows.min() < 0:
            raise RefusedValue(f"value {rows.min():g} is negative; sqrt_uint8 keeps values >= 0 only")
        scale = _scale(rows)
        codes = np.rint(255 * np.sqrt(rows.astype(np.float32) / _divisor(scale)))
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


class Int8Codec(_ScaledCodec):
    """int8 codes of v / scale, for features; -128 is never written."""

    def stored(self, spec: ArraySpec) -> tuple[StoredArray, ...]:
        return self._stored(spec, "int8", -128, True)

    def encode(self, rows: Array, options: Options) -> dict[str, Array]:
        scale = _scale(np.abs(rows))
        codes = np.rint(rows.astype(np.float32) / _divisor(scale) * 127)
        return {"": codes.astype(np.int8), "scale": scale}

    def decode(self, stored: dict[str, Array], options: Options) -> Array:
        fraction = stored[""].astype(np.float32) / np.float32(127)
        return stored["scale"].astype(np.float32)[..., None] * fraction

    def stated_error(self, options: Options) -> str:
        return "|error| <= s/254 + 1e-6 s, s = the row's largest |value| rounded up to float16"

    def max_error(self, rows: Array, options: Options) -> Array:
        scale = _scale(np.abs(rows)).astype(np.float64)[..., None]
        return np.broadcast_to(scale / 254 + 1e-6 * scale, rows.shape)


def _scale(magnitudes: Array) -> Array:
    """Return the largest value over the last axis as float16, rounded up, so that no code passes its range."""
    largest = magnitudes.max(axis=-1).astype(np.float32)
    with np.errstate(over="ignore"):
        scale = largest.astype(np.float16)
        above: Array = np.nextafter(scale, np.float16(np.inf))
        scale = np.where(scale.astype(np.float32) < largest, above, scale)
    if not np.isfinite(scale).all():
        raise too_large(magnitudes, float(np.finfo(np.float16).max), "use float32 or scale it down")
    return scale


def _divisor(scale: Array) -> Array:
    """Return the scale as float32 with a last axis of one, and 1 for a row of zeros, whose codes are 0 either way."""
    return np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
