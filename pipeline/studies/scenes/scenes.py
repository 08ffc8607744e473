"""Scenes of three to five emoji in a 3 x 3 grid on a named background. One seeded generator draws everything."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.studies.emoji.scenes import BACKGROUNDS, Concept, Scene, Thing
from pipeline.studies.emoji.scenes import all_concepts as emoji_concepts

GRID = 3
CELL_SIZE = 96
IMAGE_SIZE = GRID * CELL_SIZE
EMOJI_SIZES = (72, 80, 88)
STYLES = ("noto", "twemoji")
COUNTS = {3: "three", 4: "four", 5: "five"}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
# Gray is left out: it is the colour of many tools.
COLOURS = tuple(colour for colour in sorted(BACKGROUNDS) if colour != "gray")


@cache
def kinds() -> dict[str, dict[str, Any]]:
    """Return each kind's verb and names."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


@cache
def all_concepts() -> tuple[Concept, ...]:
    """Return the 40 concepts, kind by kind."""
    by_name = {concept.name: concept for concept in emoji_concepts()}
    return tuple(by_name[name] for kind in kinds().values() for name in kind["names"])


def make_scene(chance: random.Random) -> Scene:
    """Draw a scene of different concepts in one style; its things are in the order of their cells, 0 to 8."""
    number = chance.choice(sorted(COUNTS))
    cells = sorted(chance.sample(range(GRID**2), number))
    shown = chance.sample(all_concepts(), number)
    things = tuple(_place(chance, concept, cell) for concept, cell in zip(shown, cells, strict=True))
    return Scene(chance.choice(STYLES), chance.choice(COLOURS), things)


def _place(chance: random.Random, concept: Concept, cell: int) -> Thing:
    size = chance.choice(EMOJI_SIZES)
    left, top = (chance.randint(0, CELL_SIZE - size) for _ in range(2))
    row, column = divmod(cell, GRID)
    return Thing(concept, cell, size, column * CELL_SIZE + left, row * CELL_SIZE + top)
