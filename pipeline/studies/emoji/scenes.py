"""Scenes of one to four emoji in a 2 x 2 grid on a named background, and questions whose answers are known.

Everything comes from one seeded generator. No answer can be guessed from how often it occurs: kinds, places,
counts and colours are drawn evenly, and half of the presence questions name a thing that is not there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

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


@dataclass(frozen=True)
class Thing:
    """One emoji of a scene: which, in which cell (0 to 3, row by row), its size and where in the picture."""

    concept: Concept
    cell: int
    size_pixels: int
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, before it is painted."""

    style: str
    background: str
    things: tuple[Thing, ...]


def make_scene(chance: random.Random, concepts: Sequence[Concept], styles: Sequence[str]) -> Scene:
    """A scene of one to four different concepts in one style."""
    cells = sorted(chance.sample(range(4), chance.randint(1, 4)))
    shown: list[Concept] = []
    while len(shown) < len(cells):
        concept = draw_concept(chance, concepts)
        if concept not in shown:
            shown.append(concept)
    things = tuple(_place(chance, concept, cell) for concept, cell in zip(shown, cells, strict=True))
    return Scene(chance.choice(styles), chance.choice(sorted(BACKGROUNDS)), things)


def draw_concept(chance: random.Random, concepts: Sequence[Concept]) -> Concept:
    """A kind first, so that all kinds are equally frequent, then one of its concepts."""
    kind = chance.choice(sorted({concept.kind for concept in concepts}))
    return chance.choice([concept for concept in concepts if concept.kind == kind])


def _place(chance: random.Random, concept: Concept, cell: int) -> Thing:
    size = chance.choice(EMOJI_SIZES)
    left, top = (chance.randint(0, CELL_SIZE - size) for _ in range(2))
    return Thing(concept, cell, size, cell % 2 * CELL_SIZE + left, cell // 2 * CELL_SIZE + top)


def paint(scene: Scene, art: Art) -> Image.Image:
    """The scene as an RGB picture of 256 x 256 pixels."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    for thing in scene.things:
        emoji = art.draw(thing.concept.name, scene.style, size_pixels=thing.size_pixels)
        image.paste(emoji, (thing.left, thing.top), emoji)
    return image


Exchange = tuple[str, str]
Asker = Callable[[random.Random, Scene, Sequence[Concept]], Exchange]


def _ask_name(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    thing = chance.choice(scene.things)
    return f"What is at the {PLACES[thing.cell]}?", thing.concept.name


def _ask_kind(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    thing = chance.choice(scene.things)
    return f"What kind of thing is at the {PLACES[thing.cell]}?", thing.concept.kind


def _ask_place(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    thing = chance.choice(scene.things)
    return f"Find the {thing.concept.name}.", PLACES[thing.cell]


def _ask_presence(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    shown = [thing.concept for thing in scene.things]
    if chance.random() < 0.5:
        return f"Any {chance.choice(shown).name} here?", "yes"
    while (absent := draw_concept(chance, concepts)) in shown:
        pass
    return f"Any {absent.name} here?", "no"


def _ask_count(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    return "How many things are there?", str(len(scene.things))


def _ask_background(chance: random.Random, scene: Scene, concepts: Sequence[Concept]) -> Exchange:
    return "What colour is the background?", scene.background


QUESTIONS: dict[str, Asker] = {
    "name": _ask_name,
    "kind": _ask_kind,
    "place": _ask_place,
    "presence": _ask_presence,
    "count": _ask_count,
    "background": _ask_background,
}


def ask(
    chance: random.Random, scene: Scene, concepts: Sequence[Concept], *, key: str, image: str
) -> list[dict[str, Any]]:
    """One LLaVA record for each type of question, all about one picture; `concepts` are those of its set."""
    records = []
    for question_type, asker in QUESTIONS.items():
        question, answer = asker(chance, scene, concepts)
        records.append(
            {
                "id": f"{key}-{question_type}",
                "image": image,
                "question_type": question_type,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    return records
