"""Scenes of one to four emoji in a 2 x 2 grid on a named background, and questions whose answers are known.

One seeded generator draws everything. No answer can be guessed from its frequency: kinds, places, counts and colours
are drawn evenly, and half of the presence questions name a thing that is not shown. `concepts.yaml` lists the things.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from blake3 import blake3

from pipeline.studies.demo import llava_record

HELD_OUT_SHARE = 0.15
IMAGE_SIZE = 256
CELL_SIZE = IMAGE_SIZE // 2
EMOJI_SIZES = (80, 88, 96, 104, 112)
PLACES = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "red": (225, 70, 70),
    "orange": (250, 165, 70),
    "yellow": (250, 230, 90),
    "green": (110, 200, 110),
    "blue": (90, 140, 235),
    "purple": (160, 100, 200),
    "pink": (250, 170, 200),
    "black": (25, 25, 25),
}
QUESTIONS = ("name", "kind", "place", "presence", "count", "background")


@dataclass(frozen=True)
class Concept:
    """One thing that a scene can show: emojibase's label, the name in questions and answers, and its kind."""

    label: str
    name: str
    kind: str

    @property
    def held_out(self) -> bool:
        """Whether no training scene shows it, in any style. The hash of the name decides, so nothing is chosen."""
        share = int.from_bytes(blake3(self.name.encode()).digest(8)) / 2**64
        return share < HELD_OUT_SHARE


@cache
def all_concepts() -> tuple[Concept, ...]:
    """Return every concept, kind by kind."""
    kinds: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("concepts.yaml").read_text())
    return tuple(
        Concept(label, name or label, kind)
        for kind, entries in kinds.items()
        for label, _, name in (entry.partition("=") for entry in entries)
    )


@dataclass(frozen=True)
class Thing:
    """One emoji of a scene; cells are numbered from 0 on, row by row, and lengths are in pixels."""

    concept: Concept
    cell: int
    size: int
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    style: str
    background: str
    things: tuple[Thing, ...]


def make_scene(chance: random.Random, concepts: Sequence[Concept], styles: Sequence[str]) -> Scene:
    """Draw a scene of one to four different concepts in one style."""
    cells = sorted(chance.sample(range(4), chance.randint(1, 4)))
    shown: list[Concept] = []
    while len(shown) < len(cells):
        concept = draw_concept(chance, concepts)
        if concept not in shown:
            shown.append(concept)
    things = tuple(_place(chance, concept, cell) for concept, cell in zip(shown, cells, strict=True))
    return Scene(chance.choice(styles), chance.choice(sorted(BACKGROUNDS)), things)


def draw_concept(chance: random.Random, concepts: Sequence[Concept]) -> Concept:
    """Draw a kind, so that all kinds are equally frequent, then one of its concepts."""
    kind = chance.choice(sorted({concept.kind for concept in concepts}))
    return chance.choice([concept for concept in concepts if concept.kind == kind])


def _place(chance: random.Random, concept: Concept, cell: int) -> Thing:
    size = chance.choice(EMOJI_SIZES)
    left, top = (chance.randint(0, CELL_SIZE - size) for _ in range(2))
    return Thing(concept, cell, size, cell % 2 * CELL_SIZE + left, cell // 2 * CELL_SIZE + top)


def ask(
    chance: random.Random, scene: Scene, concepts: Sequence[Concept], *, key: str, image: str
) -> list[dict[str, Any]]:
    """Return one LLaVA record for each type of question about a scene; `concepts` are those of its set."""
    named, classified, located = (chance.choice(scene.things) for _ in range(3))
    exchanges = {
        "name": (f"What is at the {PLACES[named.cell]}?", named.concept.name),
        "kind": (f"What kind of thing is at the {PLACES[classified.cell]}?", classified.concept.kind),
        "place": (f"Find the {located.concept.name}.", PLACES[located.cell]),
        "presence": _presence(chance, [thing.concept for thing in scene.things], concepts),
        "count": ("How many things are there?", str(len(scene.things))),
        "background": ("What colour is the background?", scene.background),
    }
    return [llava_record(f"{key}-{name}", image, name, *exchanges[name]) for name in QUESTIONS]


def _presence(chance: random.Random, shown: list[Concept], concepts: Sequence[Concept]) -> tuple[str, str]:
    if chance.random() < 0.5:
        return f"Any {chance.choice(shown).name} here?", "yes"
    while (absent := draw_concept(chance, concepts)) in shown:
        pass
    return f"Any {absent.name} here?", "no"
