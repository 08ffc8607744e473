"""The study's sets of scenes, written as LLaVA records and PNG files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.studies.emoji.art import Art
from pipeline.studies.emoji.scenes import Scene
from pipeline.studies.scenes.scenes import IMAGE_SIZE, make_scene
from pipeline.studies.scenes.texts import ask


@dataclass(frozen=True)
class SceneSet:
    """How a set is drawn: number of scenes, and seed."""

    num_images: int
    seed: int


SETS = {
    "train": SceneSet(3000, seed=11),
    # For every choice that is made by looking at results: layers, settings, weights.
    "choice": SceneSet(300, seed=12),
    "test": SceneSet(300, seed=13),
}

# The base models see more scenes than the twigs.
BASE_SETS = {"train": SETS["train"], "extra": SceneSet(5000, seed=14)}


def scenes_of(name: str, scenes: SceneSet) -> Iterator[tuple[str, Scene, list[dict[str, Any]]]]:
    """Yield (path of the picture, scene, its records) of a set, the same each time."""
    chance = random.Random(scenes.seed)
    for number in range(scenes.num_images):
        scene = make_scene(chance)
        key, image = f"{name}-{number:04d}", f"{name}/{number:04d}.png"
        yield image, scene, ask(chance, scene, key=key, image=image)


def write_sets(sets: Mapping[str, SceneSet], *, art: Art, output: Path) -> None:
    """Write NAME.json and images/NAME/*.png of each set, and the art's licences, to `output`."""
    for name, scenes in sets.items():
        (output / "images" / name).mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = []
        for image, scene, asked in scenes_of(name, scenes):
            art.paint(scene, image_size=IMAGE_SIZE).save(output / "images" / image)
            records += asked
        (output / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        print(
            f"{output / name}.json: {len(records)} questions about {scenes.num_images} pictures", flush=True
        )
    (output / "LICENSES.md").write_text(art.licenses)
