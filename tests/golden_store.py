"""A small store of each format kept in tests/golden/store_format_*: every codec, and what the store gives back.

    python tests/golden_store.py     writes that of the present format; see tests/golden/README.md

Values are random. Samples have no image, one, or two; two samples share an image; each part has a reject.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
EXPECTED, EXPECTED_ARRAYS = "expected.json", "expected_arrays.npz"
PARTS = ("shard-000000", "shard-000001")
HEADS, HIDDEN, TOP_K, DRAWS = 4, 16, 8, 5
GRIDS, TOKENS = ((3, 3), (2, 3), (0, 0)), (9, 6, 4)  # of the images of a part
# Of each sample of a part: its name, its images, its rows of text after the first image, its answers.
SAMPLES = (("one", (0,), 7, 3), ("none", (), 5, 2), ("two", (1, 0), 4, 4), ("last", (2,), 9, 1))


def folder_of(version: int) -> Path:
    return GOLDEN / f"store_format_{version}"


def write(folder: Path) -> None:
    """Write a store of two parts, and beside it what it gives back."""
    from cache import Store, StoreWriter

    shutil.rmtree(folder, ignore_errors=True)
    store = folder / "store"
    writer = StoreWriter.open(store, _manifest())
    for number, name in enumerate(PARTS):
        with writer.part(name, source={"shard": f"{name}.tar", "bytes": 10240 + number}) as part:
            _fill(part, number)
            part.commit(seen=len(SAMPLES) + 1, seconds=1.5)
    for name in ("tmp", "leases", ".lock"):
        path = store / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    np.savez_compressed(folder / EXPECTED_ARRAYS, **decoded(Store(store)))
    (folder / EXPECTED).write_text(json.dumps(facts(Store(store)), indent=1) + "\n")


def decoded(store: Any) -> dict[str, np.ndarray]:
    """Return every array of every sample, by '<key>/<array>', and blocks of ragged ones, '<key>/<array>#<block>'."""
    found: dict[str, np.ndarray] = {}
    for key, (name, values) in _everything(store):
        if isinstance(values, list):
            found |= {f"{key}/{name}#{number}": block for number, block in enumerate(values)}
        else:
            found[f"{key}/{name}"] = values
    return found


def _everything(store: Any) -> Iterator[tuple[str, tuple[str, Any]]]:
    for key in store.keys():  # noqa: SIM118
        yield from ((key, item) for item in store.read(key, list(store.manifest.specs)).items())


def facts(store: Any) -> dict[str, Any]:
    """Return what the store says of itself, its samples and its rejects, JSON-ready."""
    from cache import summarise

    summary = summarise(store.path).to_json()
    entries = {part: [_entry(entry) for entry in store.entries(part)] for part in store.parts}
    rejects = {part: store.rejects(part) for part in store.parts}
    found = {"summary": {name: value for name, value in summary.items() if name != "path"}, "entries": entries,
             "rejects": rejects, "digest": store.manifest.contents_digest(),
             "contents": {part: store.contents(part, ["vision/fixed_point"]) for part in store.parts}}  # fmt: skip
    return json.loads(json.dumps(found))


def _entry(entry: Any) -> dict[str, Any]:
    spans = [vars(span) for span in (*entry.image_spans, entry.json_span)]
    tokens = {"tokens": entry.tokens, "grids": entry.grids} if entry.tokens else {}  # format 1 has none
    return {"key": entry.key, "images": list(entry.images), "spans": spans} | tokens


def _manifest() -> Any:
    from cache import FORMAT_VERSION, Fingerprint, Manifest

    fingerprint = Fingerprint(*(digit * 64 for digit in "1234"), capture="c" * 64, family="f" * 64)
    teacher, capture = {"name": "teacher", "num_heads": HEADS}, {"dtype": "float32"}
    return Manifest(FORMAT_VERSION, fingerprint, _specs(), teacher, capture, {"command": "golden"}, PARTS)


def _specs() -> tuple[Any, ...]:
    from cache import ArraySpec

    codecs = {"sqrt_uint8": {}, "fixed_point": {"step": 2.0**-12}, "float16": {}}
    attention = [
        ArraySpec(f"attention/{heads}/{codec}", "R H N", (size, None), "sample", codec, options)
        for heads, size in (("each", HEADS), ("mean", 1))
        for codec, options in codecs.items()
    ]
    vision = [
        ArraySpec(f"vision/{codec}", "I D N", (HIDDEN, None), "image", codec, options)
        for codec, options in {"fixed_point": {"step": 2.0**-7}, "int8": {}, "float32": {}}.items()
    ]
    ids, integers = {"dtype": "uint16"}, {"dtype": "int32"}
    return (
        ArraySpec("input_ids", "S", (), "sample", "integer", integers),
        ArraySpec("labels", "S", (), "sample", "integer", integers),
        *attention,
        *vision,
        ArraySpec("logits/ids", "P K", (TOP_K,), "sample", "integer", ids),
        ArraySpec("logits/log_probs", "P K", (TOP_K,), "sample", "float16", {}),
        ArraySpec("logits/tail", "P", (), "sample", "float16", {}),
        ArraySpec("logits/draw_ids", "P M", (DRAWS,), "sample", "integer", ids),
        ArraySpec("logits/draw_log_probs", "P M", (DRAWS,), "sample", "float16", {}),
    )


def _fill(part: Any, number: int) -> None:
    from cache import SampleEntry, Span

    chance = np.random.default_rng(number)
    for image in range(3):
        tokens, grid = TOKENS[image], GRIDS[image]
        part.add_image(_digest(number, image), _image_arrays(chance, tokens), tokens=tokens, grid=grid)
    for place, (name, images, rows, answers) in enumerate(SAMPLES):
        key, digests = f"{name}-{number}", tuple(_digest(number, image) for image in images)
        spans = tuple(Span(f"{key}.{n}.png", 512 + 1024 * n, 700 + n) for n in range(len(images)))
        entry = SampleEntry(key, digests, spans, Span(f"{key}.json", 65536 + 1024 * place, 90))
        part.add(entry, _sample_arrays(chance, [TOKENS[image] for image in images], rows, answers))
    part.reject(f"long-{number}", "it is too long")


def _digest(number: int, image: int) -> str:
    """The last image is named as a variant."""
    return f"{number}{image}".ljust(64, "e") + (":crop" if image == 2 else "")


def _image_arrays(chance: np.random.Generator, tokens: int) -> dict[str, Any]:
    values = chance.normal(size=(1, HIDDEN, tokens)).astype(np.float32)
    return {spec.name: values for spec in _specs() if spec.owner == "image"}


def _sample_arrays(chance: np.random.Generator, tokens: list[int], rows: int, answers: int) -> dict[str, Any]:
    of_heads = [chance.random((rows, HEADS, count), dtype=np.float32) / count for count in tokens]
    attention = {"each": of_heads, "mean": [block.mean(axis=1, keepdims=True) for block in of_heads]}
    arrays: dict[str, Any] = {
        spec.name: attention[spec.name.split("/")[1]]
        for spec in _specs()
        if spec.name.startswith("attention/")
    }
    log_probs = np.sort(-chance.exponential(4, size=(answers, TOP_K + DRAWS)).astype(np.float32))[:, ::-1]
    ids = chance.integers(32000, size=(answers, TOP_K + DRAWS))
    return arrays | {
        "input_ids": chance.integers(32000, size=rows + 2),
        "labels": np.append(np.full(rows + 2 - answers, -100), chance.integers(32000, size=answers)),
        "logits/ids": ids[:, :TOP_K],
        "logits/log_probs": log_probs[:, :TOP_K],
        "logits/tail": -chance.exponential(3, size=answers).astype(np.float32),
        "logits/draw_ids": ids[:, TOP_K:],
        "logits/draw_log_probs": log_probs[:, TOP_K:],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from cache import FORMAT_VERSION

    write(folder_of(FORMAT_VERSION))
