"""A small store whose images differ in their number of vision tokens, for the tests of ragged arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from small_store import entry, manifest

from cache import ArraySpec, PartWriter, StoreWriter

ARRAYS = (
    ArraySpec("attention/layer_0", "R H N", (2, None), "sample", "sqrt_uint8", {}),
    ArraySpec("attention/layer_1", "R H N", (1, None), "sample", "fixed_point", {"step": 2.0**-12}),
    ArraySpec("map", "R N", (None,), "sample", "float32", {}),
    ArraySpec("vision", "I D N", (4, None), "image", "fixed_point", {"step": 2.0**-7}),
    ArraySpec("vision_int8", "I D N", (4, None), "image", "int8", {}),
    ArraySpec("pooled", "I D", (3,), "image", "float32", {}),
    ArraySpec("input_ids", "S", (), "sample", "integer", {"dtype": "int32"}),
)
A, B, CROP = "a" * 64, "b" * 64, "a" * 64 + ":crop"
TOKENS = {A: 6, B: 4, CROP: 5}
GRIDS = {A: (2, 3), B: (2, 2), CROP: (0, 0)}
# The samples of a part: their images, and the rows of text that each image has.
SAMPLES = {"0": ((A,), 5), "1": ((B, A, CROP), 3), "2": ((), 0), "3": ((CROP,), 0), "4": ((B, B), 2)}
PART = "shard-000000"


def image_arrays(image: str, *, tokens: int = 0) -> dict[str, Any]:
    """Random arrays of an image, the same for the same name."""
    chance, tokens = np.random.default_rng(sum(image.encode())), tokens or TOKENS[image]
    vision = chance.normal(size=(1, 4, tokens)).astype(np.float32)
    return {"vision": vision, "vision_int8": vision, "pooled": chance.random((1, 3), dtype=np.float32)}


def sample_arrays(seed: int, tokens: Sequence[int], rows: int) -> dict[str, Any]:
    """Random arrays of a sample whose images have so many tokens, with `rows` rows for each image."""
    chance = np.random.default_rng(seed)
    blocks = {
        name: [chance.random((rows, *shape, count), dtype=np.float32) for count in tokens]
        for name, shape in (("attention/layer_0", (2,)), ("attention/layer_1", (1,)), ("map", ()))
    }
    return {**blocks, "input_ids": chance.integers(0, 32000, size=rows + 2)}


def arrays_of(prefix: str, name: str) -> dict[str, Any]:
    """What is written of a sample."""
    images, rows = SAMPLES[name]
    return sample_arrays(ord(prefix) + int(name), [TOKENS[image] for image in images], rows)


def fill_part(part: PartWriter, prefix: str) -> None:
    for image in TOKENS:
        part.add_image(image, image_arrays(image), tokens=TOKENS[image], grid=GRIDS[image])
    for name, (images, _) in SAMPLES.items():
        part.add(entry(prefix + name, *images), arrays_of(prefix, name))
    part.reject(f"{prefix}5", "not an image")


def write_ragged_store(path: Path, *, parts: Mapping[str, str] | None = None) -> Path:
    """A finished store of two parts, with the keys a0 .. a4 and b0 .. b4."""
    parts = parts or {PART: "a", "shard-000001": "b"}
    writer = StoreWriter.open(path, manifest(*parts, arrays=ARRAYS))
    for name, prefix in parts.items():
        with writer.part(name, source={"name": f"{name}.tar", "bytes": 10240}) as part:
            fill_part(part, prefix)
            part.commit(seen=6)
    return path
