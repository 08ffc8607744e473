"""Questions about scenes, and their answers: four short ones, a row of the grid, and a description of the whole.

Everything is said in about a hundred words of a fixed order, so that a small model learns it in minutes.
"""

from __future__ import annotations

import random
import re
from typing import Any

from pipeline.studies.demo import llava_record
from pipeline.studies.emoji.scenes import Scene, Thing
from pipeline.studies.scenes.scenes import COLOURS, COLUMNS, COUNTS, GRID, PLACES, ROWS, all_concepts, kinds

SHORT_QUESTIONS = ("colour", "count", "name", "kind")
QUESTIONS = (*SHORT_QUESTIONS, "row", "describe")


def ask(chance: random.Random, scene: Scene, *, key: str, image: str) -> list[dict[str, Any]]:
    """Return one LLaVA record for each type of question about a scene."""
    named, classified, neighbour = (chance.choice(scene.things) for _ in range(3))
    row = neighbour.cell // GRID  # so that an asked row is never empty
    exchanges = {
        "colour": ("what colour is the background?", scene.background),
        "count": ("how many things are there?", COUNTS[len(scene.things)]),
        "name": (f"what is in the {PLACES[named.cell]} cell?", named.concept.name),
        "kind": (f"what kind of thing is in the {PLACES[classified.cell]} cell?", classified.concept.kind),
        "row": (f"tell all about the {ROWS[row]} row.", describe_row(scene, row)),
        "describe": ("describe the picture.", describe(scene)),
    }
    return [llava_record(f"{key}-{name}", image, name, *exchanges[name]) for name in QUESTIONS]


def describe(scene: Scene) -> str:
    """Return a description: background, count, and a sentence for each thing."""
    first = f"a {scene.background} picture with {COUNTS[len(scene.things)]} things."
    return " ".join([first, *map(_sentence, scene.things)])


def describe_row(scene: Scene, row: int) -> str:
    """Return a sentence for each cell of a row, also for the empty ones."""
    things = {thing.cell: thing for thing in scene.things}
    cells = range(row * GRID, (row + 1) * GRID)
    return " ".join(
        _sentence(things[cell]) if cell in things else f"the {PLACES[cell]} cell is empty." for cell in cells
    )


def _sentence(thing: Thing) -> str:
    concept = thing.concept
    verb = kinds()[concept.kind]["verb"]
    return f"in the {PLACES[thing.cell]} cell {verb} the {concept.name}, one {concept.kind}."


def all_words() -> list[str]:
    """Return every word and mark that questions and answers use, sorted."""
    first, second = all_concepts()[:2]
    scene = Scene(
        "noto", COLOURS[0], (Thing(first, 0, 0, 0, 0), Thing(second, 1, 0, 0, 0), Thing(first, 3, 0, 0, 0))
    )
    records = ask(random.Random(0), scene, key="", image="")
    said = " ".join(turn["value"].removeprefix("<image>\n") for r in records for turn in r["conversations"])
    said += f" {describe_row(scene, 2)}"
    lists = (COLOURS, COLUMNS, ROWS, COUNTS.values(), kinds(), (concept.name for concept in all_concepts()))
    verbs = (kind["verb"] for kind in kinds().values())
    return sorted({*re.findall(r"\w+|[^\w\s]+", said), *verbs, *(word for words in lists for word in words)})
