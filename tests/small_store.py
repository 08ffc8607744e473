"""A small store with every codec, for the tests of the store: three samples, two images, two parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FORMAT_VERSION, ArraySpec, Fingerprint, Manifest, PartWriter, SampleEntry, Span, StoreWriter
from cache.files.durable import hash_file
from cache.files.local_files import sizes_below
from cache.format.arrays import array_files
from cache.format.codec import StoredArray
from cache.format.documents import document_bytes
from cache.format.layout import PART_RECORD
from cache.format.records import FileRecord, PartRecord, read_part_record

Arrays = dict[str, NDArray[Any]]

FINGERPRINT = Fingerprint(teacher="7e", tokenizer="70", template="7a", image_preprocessing="11", capture="ca")
ARRAYS = (
    ArraySpec("attention/layer_0", "R H N", (2, 6), "sample", "sqrt_uint8", {}),
    ArraySpec("vision", "I D N", (4, 6), "image", "fixed_point", {"step": 2.0**-7}),
    ArraySpec("logits/ids", "S K", (3,), "sample", "integer", {"dtype": "uint16"}),
    ArraySpec("logits/values", "S K", (3,), "sample", "float16", {}),
    ArraySpec("hidden", "R D", (4,), "sample", "float32", {}),
    ArraySpec("input_ids", "T", (), "sample", "integer", {"dtype": "int32"}),
)
DIGEST_A, DIGEST_B = "a" * 64, "b" * 64
TOKENS, GRIDS = {DIGEST_A: 6, DIGEST_B: 6}, {DIGEST_A: (2, 3), DIGEST_B: (0, 0)}


def manifest(*parts: str, **changes: Any) -> Manifest:
    planned = parts or ("shard-000000", "shard-000001")
    made = Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=FINGERPRINT,
        arrays=ARRAYS,
        teacher={"name": "tiny", "num_heads": 2},
        capture={"attention": {"layers": [0]}},
        provenance={"command": "test"},
        planned_parts=planned,
    )
    return replace(made, **changes)


def entry(key: str, *digests: str) -> SampleEntry:
    spans = tuple(Span(f"{key}.{i}.jpg", 512 + 1024 * i, 700) for i in range(len(digests)))
    return SampleEntry(key, digests, spans, Span(f"{key}.json", 4096, 90))


def entry_read(key: str, *digests: str) -> SampleEntry:
    """The entry as it is read: with the tokens and grids of the images that `fill_part` writes."""
    tokens, grids = (tuple(of[digest] for digest in digests) for of in (TOKENS, GRIDS))
    return replace(entry(key, *digests), tokens=tokens, grids=grids)


def image_arrays(seed: int) -> Arrays:
    return {"vision": _random(seed).normal(size=(1, 4, 6)).astype(np.float32)}


def sample_arrays(seed: int, *, num_rows: int = 5, num_answers: int = 2) -> Arrays:
    random = _random(seed)
    return {
        "attention/layer_0": random.random((num_rows, 2, 6), dtype=np.float32),
        "logits/ids": random.integers(0, 65536, size=(num_answers, 3)),
        "logits/values": random.normal(size=(num_answers, 3)).astype(np.float32),
        "hidden": random.normal(size=(num_rows, 4)).astype(np.float32),
        "input_ids": random.integers(-100, 32000, size=(num_rows,)),
    }


def fill_part(part: PartWriter, prefix: str) -> None:
    """Three samples: one image, two images (one shared), none; and one reject."""
    part.add_image(DIGEST_A, image_arrays(1), tokens=TOKENS[DIGEST_A], grid=GRIDS[DIGEST_A])
    part.add(entry(f"{prefix}0", DIGEST_A), sample_arrays(10))
    part.add_image(DIGEST_B, image_arrays(2), tokens=TOKENS[DIGEST_B], grid=GRIDS[DIGEST_B])
    part.add(entry(f"{prefix}1", DIGEST_B, DIGEST_A), sample_arrays(11, num_rows=3))
    part.add(entry(f"{prefix}2"), sample_arrays(12, num_answers=0))
    part.reject(f"{prefix}3", "not an image")


def write_store(path: Path) -> Path:
    """A finished store of two parts; keys a0 a1 a2 and b0 b1 b2."""
    writer = StoreWriter.open(path, manifest())
    for name, prefix in (("shard-000000", "a"), ("shard-000001", "b")):
        with writer.part(name, source={"name": f"{name}.tar", "bytes": 10240}) as part:
            fill_part(part, prefix)
            part.commit(seen=4)
    return path


def write_clashing_store(path: Path) -> Path:
    """A store whose parts one and two hold the same key: no writer makes one, so a part is moved in."""
    for name in ("one", "two"):
        with StoreWriter.open(path / name, manifest("one", "two")).part(name, source={}) as part:
            part.add(entry("k"), sample_arrays(0))
            part.commit()
    (path / "two/parts/two").rename(path / "one/parts/two")
    return path / "one"


def describe_files(directory: Path) -> dict[str, FileRecord]:
    """Size and hash of every file as it now is, by relative path."""
    sizes = sizes_below(directory)
    return {name: FileRecord(size, hash_file(directory / name)) for name, size in sizes.items()}


def write_array(path: Path, stored: StoredArray, *, rows: NDArray[Any], axes: list[str]) -> None:
    for name, data in array_files(stored, rows=rows, axes=axes).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def rewrite_record(directory: Path, **changes: Any) -> None:
    """Make part.json say other things, with a right checksum; the files are described as they now are."""
    record: PartRecord = read_part_record(directory)
    (directory / PART_RECORD).unlink()
    record = replace(record, files=describe_files(directory))
    (directory / PART_RECORD).write_bytes(document_bytes(replace(record, **changes).to_json()))


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip_bit(file: Path, *, offset: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
