"""Encodes what is handed over for one image or sample; nothing is kept of it if one array is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cache.errors import ArrayMismatch, MisusedWriter
from cache.format.blocks import encode_blocks
from cache.format.codec import Array
from cache.format.codecs import encode_rows, stored_arrays
from cache.format.schema import ArraySpec

Specs = Mapping[str, ArraySpec]
Values = Array | Sequence[Array]
"""Of an array with fixed rows all of them, of a ragged one a list with a block for each image."""
Codes = dict[str, Array]
"""By the name of the stored array."""


def image_codes(specs: Specs, arrays: Mapping[str, Array], *, tokens: int) -> Codes:
    """Return the codes of an image's arrays, each of one row; a ragged one has `tokens` columns."""
    _check_names(specs, arrays, owner="image")
    encoded: Codes = {}
    for name, spec in specs.items():
        if len(arrays[name]) != 1:
            raise ArrayMismatch(name, expected="one row for one image", found=f"{len(arrays[name])} rows")
        encoded |= _codes(spec, [arrays[name]], [tokens])
    return encoded


def sample_codes(
    specs: Specs, arrays: Mapping[str, Values], *, tokens: Sequence[int]
) -> tuple[Codes, dict[str, int]]:
    """Return the codes of a sample's arrays, and how many rows each has; `tokens` are those of its images."""
    _check_names(specs, arrays, owner="sample")
    encoded: Codes = {}
    rows: dict[str, int] = {}
    for name, spec in specs.items():
        blocks = _blocks(spec, arrays[name])
        encoded |= _codes(spec, blocks, tokens)
        rows[name] = sum(map(len, blocks))
    return encoded, rows


def check_tokens(image: str, tokens: int, grid: tuple[int, int], *, ragged: Sequence[str]) -> None:
    """Raise `MisusedWriter` unless an image's number of vision tokens and its grid are possible and agree.

    Every image needs its tokens where the store has `ragged` arrays; elsewhere 0 says that they are not known.
    """
    if tokens < 0 or (ragged and not tokens):
        needed = f"array {ragged[0]!r} needs at least one" if ragged else "they cannot be fewer than none"
        raise MisusedWriter(
            f"Image {image} was added with {tokens} vision tokens, but {needed}; hand over their number as `tokens`."
        )
    if grid != (0, 0) and (min(grid) < 1 or grid[0] * grid[1] != tokens):
        raise MisusedWriter(
            f"Image {image} was added with {tokens} vision tokens in a grid of {grid[0]} x {grid[1]}; "
            "hand over a grid of so many, or (0, 0) if they form no single rectangle."
        )


def _check_names(specs: Specs, arrays: Mapping[str, Values], *, owner: str) -> None:
    for name in sorted(specs.keys() ^ arrays.keys()):
        expected = f"the arrays of one {owner}: {', '.join(specs) or 'none'}"
        raise ArrayMismatch(name, expected=expected, found=", ".join(arrays) or "none")


def _blocks(spec: ArraySpec, values: Values) -> Sequence[Array]:
    """Return the values as a list: the one array with fixed rows, or a block for each image."""
    if isinstance(values, np.ndarray):
        if spec.is_ragged:
            expected, found = "a list with a block for each image", f"one array of shape {values.shape}"
            raise ArrayMismatch(spec.name, expected=expected, found=found)
        return [values]
    if not spec.is_ragged:
        raise ArrayMismatch(spec.name, expected="one array", found=f"a list of {len(values)}")
    return values


def _codes(spec: ArraySpec, blocks: Sequence[Array], tokens: Sequence[int]) -> Codes:
    codes = encode_blocks(spec, blocks, tokens) if spec.is_ragged else encode_rows(spec, blocks[0])
    return {stored.name(spec): codes[stored.suffix] for stored in stored_arrays(spec)}
