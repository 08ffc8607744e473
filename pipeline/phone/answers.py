"""A picture of answers: some questions with their images, and what each runtime says."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.errors import writing

NUM_SHOWN = 6
COLUMNS = 3
GREY, RED = "#6b6b6b", "#b22222"


@dataclass(frozen=True)
class Shown:
    """A question: its image uint8 'Y X C', the right answer, and each runtime's by name."""

    text: str
    image: NDArray[np.uint8] | None
    answer: str
    answers: Mapping[str, str]

    @property
    def differs(self) -> bool:
        return len(set(self.answers.values())) > 1


def draw_answers(questions: Sequence[Shown], file: Path) -> None:
    """Write a sheet of questions, first those that runtimes answer differently; wrong answers are red."""
    chosen = sorted(questions, key=lambda one: not one.differs)[:NUM_SHOWN]
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.5 * rows), layout="constrained")
    grids = figure.subplots(rows, 2 * COLUMNS, squeeze=False, width_ratios=[1, 1.5] * COLUMNS).reshape(-1, 2)
    for picture, words in grids:
        picture.set_axis_off()
        words.set_axis_off()
    for (picture, words), one in zip(grids, chosen, strict=False):
        if one.image is not None:
            picture.imshow(one.image, interpolation="nearest")
        lines = [(textwrap.fill(one.text, 30), "black")]
        lines += [
            (f"{name}: {said or '(nothing)'}", GREY if said == one.answer else RED)
            for name, said in one.answers.items()
        ]
        for number, (line, colour) in enumerate(lines):
            words.text(0, 0.9 - 0.17 * number - 0.12 * (number > 0), line, fontsize=8, color=colour, va="top")
    with writing(file):
        figure.savefig(file, dpi=130)


def question_text(prompt: str) -> str:
    """Return the last question of a prompt of the dialogue `v1`; of another prompt all of it."""
    return prompt.rpartition("USER:")[2].rpartition("ASSISTANT:")[0].strip() or prompt.strip()
