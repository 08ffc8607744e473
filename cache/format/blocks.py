"""Encodes and decodes the blocks of ragged arrays: rows that are as long as their image has vision tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cache.errors import ArrayMismatch
from cache.format.codec import Array
from cache.format.codecs import decode_rows, encode_rows, stored_arrays
from cache.format.schema import ArraySpec


def encode_blocks(spec: ArraySpec, blocks: Sequence[Array], tokens: Sequence[int]) -> dict[str, Array]:
    """Return the stored arrays, by suffix, of one block for each image, 'rows *leading <tokens of the image>'.

    Raises as `encode_rows` does, and `ArrayMismatch` if the number of blocks or of their rows is not right.
    """
    _check_blocks(spec, blocks, tokens)
    encoded = [
        encode_rows(spec.with_tokens(count), block) for block, count in zip(blocks, tokens, strict=True)
    ]
    return {
        stored.suffix: np.concatenate([
            np.empty((0, *stored.row_shape), dtype=stored.dtype),
            *(codes[stored.suffix].ravel() if stored.is_flat else codes[stored.suffix] for codes in encoded),
        ])
        for stored in stored_arrays(spec)
    }  # fmt: skip


def decode_blocks(
    spec: ArraySpec, stored: dict[str, Array], shapes: Sequence[tuple[int, ...]]
) -> list[Array]:
    """Return the blocks of these shapes, 'rows *leading tokens', that `stored` holds one after the other.

    An image-owned block has one row, which is returned without the axis of rows.
    """
    arrays, blocks = stored_arrays(spec), list[Array]()
    element = row = 0
    for shape in shapes:
        end = element + math.prod(shape)
        codes = {
            one.suffix: stored[one.suffix][element:end].reshape(shape)
            if one.is_flat
            else stored[one.suffix][row : row + shape[0]]
            for one in arrays
        }
        values = decode_rows(spec, codes)
        blocks.append(values[0] if spec.owner == "image" else values)
        element, row = end, row + shape[0]
    return blocks


def _check_blocks(spec: ArraySpec, blocks: Sequence[Array], tokens: Sequence[int]) -> None:
    if len(blocks) != len(tokens):
        raise ArrayMismatch(
            spec.name, expected=f"{len(tokens)} blocks, one for each image", found=f"{len(blocks)} blocks"
        )
    if len({len(block) for block in blocks}) > 1:
        found = f"blocks of {', '.join(str(len(block)) for block in blocks)} rows"
        raise ArrayMismatch(spec.name, expected="as many rows for each image", found=found)
