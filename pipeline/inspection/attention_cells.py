"""The content of a picture of a sample's attention: a cell of heat maps for each text token, and a legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.inspection.sample import Inspection, attention_distance
from pipeline.inspection.token_text import visible
from pipeline.positions import IGNORE_INDEX
from pipeline.shapes import expect_shape


@dataclass(frozen=True)
class Cell:
    """A text token's attention to one image: the teacher's, then each student's, float32 'Y X'."""

    name: str
    is_trained: bool
    shares: tuple[np.ndarray, ...]

    @property
    def difference(self) -> np.ndarray:
        """The last student's minus the teacher's."""
        return self.shares[-1] - self.shares[0]


@dataclass(frozen=True)
class Drawing:
    """The headings of a cell's heat maps, the cells of each image, and the legend in `words`."""

    headings: tuple[str, ...]
    images: tuple[tuple[Cell, ...], ...]
    words: tuple[str, ...]

    @property
    def has_students(self) -> bool:
        return len(self.headings) > 1

    @property
    def largest_share(self) -> float:
        """The largest share of all heat maps, which have one colour scale."""
        return max(float(heat.max()) for cells in self.images for cell in cells for heat in cell.shares)

    @property
    def largest_difference(self) -> float:
        return max(float(np.abs(cell.difference).max()) for cells in self.images for cell in cells)


def plan_drawing(
    inspection: Inspection,
    students: Mapping[str, Tensor],
    *,
    max_tokens: int,
    student_layer: int | None = None,
) -> Drawing:
    """Return a cell for the mean of all text after an image, and for its first tokens; `students` name -> 'T J'."""
    teacher = inspection.attention[inspection.layer].mean(dim=0)
    for name, student in students.items():
        sizes = {"T": teacher.shape[0], "J": teacher.shape[1]}
        expect_shape(f"attention of the student {name}", student, "T J", sizes)
    attention = [teacher, *students.values()]
    return Drawing(
        headings=("teacher", *students, *[f"{name} − teacher" for name in list(students)[-1:]]),
        images=tuple(_cells(inspection, attention, n, max_tokens) for n in range(len(inspection.images))),
        words=tuple(_words(inspection, students, max_tokens, student_layer)),
    )


def _cells(
    inspection: Inspection, attention: Sequence[Tensor], image: int, max_tokens: int
) -> tuple[Cell, ...]:
    grid, first = inspection.grids[image], sum(inspection.sizes[:image])
    columns = slice(first, first + inspection.sizes[image])
    after = (inspection.slots.text[0] > inspection.slots.vision[0, columns][-1]).nonzero()[:, 0]
    blocks = [block[after][:, columns].view(-1, *grid).numpy() for block in attention]
    cells = [Cell(f"mean of {len(after)}", False, tuple(block.mean(axis=0) for block in blocks))]
    for row, text_row in enumerate(after[:max_tokens].tolist()):
        place = inspection.text[text_row]
        is_trained = inspection.labels[place] != IGNORE_INDEX
        shares = tuple(block[row] for block in blocks)
        cells.append(Cell(visible(inspection.tokens[place]), is_trained, shares))
    return tuple(cells)


def _words(
    inspection: Inspection, students: Mapping[str, Tensor], max_tokens: int, student_layer: int | None
) -> list[str]:
    teacher, num_text = inspection.teacher, len(inspection.text)
    words = [
        f"Attention of {teacher.name}, layer {inspection.layer}, mean of its {teacher.num_heads} heads. "
        "Percent: how much of a token's attention is on the image. Bold: trained tokens. "
        f"Outlined: the {max(map(len, inspection.focus))} focus tokens of this layer."
    ]
    if students:
        distances = [f"{name} {attention_distance(inspection, s):.3f}" for name, s in students.items()]
        layer = "" if student_layer is None else f", layer {student_layer}"
        words.append(
            f"KL(teacher ‖ student{layer}), mean of {num_text} text tokens: {', '.join(distances)} nats."
        )
    if num_text > max_tokens:
        after = "the image" if len(inspection.images) == 1 else "each image"
        words.append(f"Shown are the first {max_tokens} text tokens after {after}, of {num_text} in all.")
    if inspection.note:
        words.append(f"Token ids in place of text: {inspection.note}.")
    return words
