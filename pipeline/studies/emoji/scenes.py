"""Scenes of one to four emoji in a 2 x 2 grid on a named background, and questions whose answers are known.

One seeded generator draws everything. No answer can be guessed from its frequency: kinds, places, counts and colours
are drawn evenly, and half of the presence questions name a thing that is not shown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.studies.demo import llava_record
from pipeline.studies.emoji.art import Art
from pipeline.studies.emoji.concepts import Concept

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
class Thing:
    """One emoji of a scene; cells are numbered 0 to 3, row by row, and lengths are in pixels."""

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


def paint(scene: Scene, art: Art) -> Image.Image:
    """Return the scene as an RGB picture of 256 x 256 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    for thing in scene.things:
        emoji = art.draw(thing.concept.name, scene.style, size=thing.size)
        image.paste(emoji, (thing.left, thing.top), emoji)
    return image


def ask(
    chance: random.Random, scene: Scene, concepts: Sequence[Concept], *, key: str, image: str
) -> list[dict[str, Any]]:
    """Return one LLaVA record for each type of question about a scene; `concepts` are those of its set."""
    asked = {name: _exchange(name, chance, scene, concepts) for name in QUESTIONS}
    return [llava_record(f"{key}-{name}", image, name, *exchange) for name, exchange in asked.items()]


def _exchange(
    question_type: str, chance: random.Random, scene: Scene, concepts: Sequence[Concept]
) -> tuple[str, str]:
    """Return a question and its answer."""
    if question_type == "count":
        return "How many things are there?", str(len(scene.things))
    if question_type == "background":
        return "What colour is the background?", scene.background
    if question_type == "presence":
        return _presence(chance, [thing.concept for thing in scene.things], concepts)
    thing = chance.choice(scene.things)
    name, place = thing.concept.name, PLACES[thing.cell]
    return {
        "name": (f"What is at the {place}?", name),
        "kind": (f"What kind of thing is at the {place}?", thing.concept.kind),
        "place": (f"Find the {name}.", place),
    }[question_type]


def _presence(chance: random.Random, shown: list[Concept], concepts: Sequence[Concept]) -> tuple[str, str]:
    if chance.random() < 0.5:
        return f"Any {chance.choice(shown).name} here?", "yes"
    while (absent := draw_concept(chance, concepts)) in shown:
        pass
    return f"Any {absent.name} here?", "no"
