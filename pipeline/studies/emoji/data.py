"""The study's sets of scenes, written as LLaVA records and PNG files.

`train` and `validation` show the training concepts in three styles. Each test set differs from them in one respect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.studies.emoji.art import SEEN_STYLES, UNSEEN_STYLE, Art
from pipeline.studies.emoji.scenes import Scene, all_concepts, ask, make_scene


@dataclass(frozen=True)
class SceneSet:
    """How a set is drawn: number of scenes, seed, styles, and whether it shows the held-out concepts."""

    num_images: int
    seed: int
    styles: tuple[str, ...] = SEEN_STYLES
    held_out: bool = False


SETS = {
    "train": SceneSet(2400, seed=1),
    "validation": SceneSet(300, seed=2),
    "new_scene": SceneSet(200, seed=3),
    "unseen_style": SceneSet(200, seed=4, styles=(UNSEEN_STYLE,)),
    "unseen_concept": SceneSet(200, seed=5, held_out=True),
}

# The extra scenes are for the teacher alone: no student sees their labels.
TEACHER_SETS = {"train": SETS["train"], "extra": SceneSet(2400, seed=6)}


def scenes_of(name: str, scenes: SceneSet) -> Iterator[tuple[str, Scene, list[dict[str, Any]]]]:
    """Yield (path of the picture, scene, its records) of a set, the same each time."""
    allowed = [concept for concept in all_concepts() if concept.held_out == scenes.held_out]
    chance = random.Random(scenes.seed)
    for number in range(scenes.num_images):
        scene = make_scene(chance, allowed, scenes.styles)
        key, image = f"{name}-{number:04d}", f"{name}/{number:04d}-{scene.style}.png"
        yield image, scene, ask(chance, scene, allowed, key=key, image=image)


def write_sets(sets: Mapping[str, SceneSet], *, art: Art, output: Path) -> None:
    """Write NAME.json and images/NAME/*.png of each set, and the art's licences, to `output`."""
    for name, scenes in sets.items():
        (output / "images" / name).mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = []
        for image, scene, asked in scenes_of(name, scenes):
            art.paint(scene).save(output / "images" / image)
            records += asked
        (output / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        print(f"{output / name}.json: {len(records)} questions about {scenes.num_images} pictures")
    (output / "LICENSES.md").write_text(art.licenses)
