"""Images of any size for the tests of model families."""

from __future__ import annotations

import io
import json
from pathlib import Path

import small_experiment
from PIL import Image

from pipeline.packing.pack import pack

SIZES = ((40, 28), (24, 60), (32, 32))


def png(width: int, height: int, seed: int = 0) -> bytes:
    """Return coarse noise as a file."""
    return small_experiment.picture(seed, (width, height))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return coarse noise as an image, another for each seed."""
    return Image.open(io.BytesIO(png(width, height, seed))).convert("RGB")


def write_shards(folder: Path) -> Path:
    """Write shards of samples with one image, two, and none; images 0 to 2 have the sizes `SIZES`."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number, size in enumerate(SIZES):
        picture(*size, seed=number).save(images / f"{number}.png")
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(_records()))
    pack(annotations, folder / "shards", image_folder=images, samples_per_shard=4)
    return folder / "shards"


def _records() -> list[dict]:
    one, text, record = small_experiment.one, small_experiment.text, small_experiment.record
    return [
        one("wide", 0, "What colour is the circle?", "blue"),
        one("tall", 1, "Is there a triangle in this image?", "no"),
        one("square", 2, "Describe it.", "a brown line"),
        text("text", "Which colours has a flag?", "red, green and black"),
        record("two", ["0.png", "1.png"], ["<image>\n<image>\nWhich of both is green?", "the first"]),
        record("late", ["2.png"], ["What do you know?", "much", "And of <image>?", "a teal shape"]),
    ]
