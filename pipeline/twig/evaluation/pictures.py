"""A picture of which vision tokens each selector keeps for a question: their cells are bright, the others dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import writing
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.questions import Question
from pipeline.inspection.heat_map import Square, draw_image
from pipeline.inspection.sheet import Sheet, wrap
from pipeline.positions import find_slots
from pipeline.twig.decoding.pruning import kept_tokens
from pipeline.twig.evaluation.asking import Asker, key_of
from pipeline.twig.evaluation.selectors import Selector
from pipeline.twig.module import Twig

MOST_SHOWN = 6
DARK = 0.25  # brightness of a cell that was dropped
# In inches.
MARGIN, WORDS, PANEL, GAP, LINE, HEAD = 0.15, 2.6, 1.5, 0.12, 0.14, 0.3
MOST_LINES = 3  # of one text
GREY = "#6b6b6b"
DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Seen:
    """A question about one image with a square grid of vision tokens: selector -> those that it keeps, bool 'Y X'."""

    question: Question
    text: str
    image: Image.Image
    kept: Mapping[str, NDArray[np.bool_]]


def seen_by(
    asker: Asker, twig: Twig, selectors: Sequence[Selector], share: Fraction
) -> tuple[list[Seen], list[str]]:
    """Return some questions, one of each type first, with what is kept of their images, and why some are missing."""
    shown = [question for question in _of_each_type(asker.questions) if _side(question)]
    notes = []
    if not shown:
        notes.append(
            "no picture of kept tokens: it shows questions about one image whose vision tokens form a square"
        )
    return [_seen(asker, twig, question, selectors, share) for question in shown[:MOST_SHOWN]], notes


def _side(question: Question) -> int:
    """Return the side of the square grid of a question's image; 0 if it has no such grid."""
    if len(question.sizes) != 1:
        return 0
    side = math.isqrt(question.sizes[0])
    return side if side * side == question.sizes[0] else 0


def _of_each_type(questions: Iterable[Question]) -> list[Question]:
    """Return the questions in an order in which all types come first."""
    ordered = sorted(questions, key=lambda one: (one.unanswered.test_set, one.unanswered.key))
    seen: dict[str, int] = {}
    ranked: list[tuple[int, Question]] = []
    for question in ordered:
        kind = question.unanswered.question_type
        ranked.append((seen.get(kind, 0), question))
        seen[kind] = seen.get(kind, 0) + 1
    return [question for _, question in sorted(ranked, key=lambda pair: pair[0])]


def _seen(
    asker: Asker, twig: Twig, question: Question, selectors: Sequence[Selector], share: Fraction
) -> Seen:
    prompts, side = asker.prompts([question]), _side(question)
    vision = find_slots(prompts.is_vision, prompts.inputs["attention_mask"]).vision
    count = twig.geometry.num_kept(side * side, float(share))
    kept: dict[str, NDArray[np.bool_]] = {}
    for selector in selectors:
        scores = selector.score(asker.base, twig, prompts, [key_of(question)])
        stays = kept_tokens(scores, vision, [count], prompts.length)
        kept[selector.name] = stays.gather(1, vision)[0].cpu().numpy().reshape(side, side)
    ids = [number for number in question.prompt.tolist() if number != asker.preparation.image_token_id]
    text = asker.preparation.tokenizer.decode(ids, skip_special_tokens=True)
    return Seen(question, text.strip(), asker.preparation.picture(question.read_image(0)), kept)


def dimmed(image: Image.Image, kept: NDArray[np.bool_]) -> Image.Image:
    """Return an image whose cells that were not kept are dark; `kept` is bool 'Y X'."""
    cells = Image.fromarray(np.uint8(kept) * 255).resize(image.size, Image.Resampling.NEAREST)
    bright = np.where(np.asarray(cells) > 0, 1.0, DARK)[:, :, None]
    return Image.fromarray(np.uint8(np.asarray(image.convert("RGB")) * bright))


def draw_kept(
    seen: Sequence[Seen], answers: Mapping[str, Sequence[Prediction]], share: Fraction, file: Path
) -> None:
    """Write a sheet: a row for each question, a column for each selector, its answer below.

    `answers` are the predictions of each selector at this share, and of the base without pruning, by name.
    """
    columns = list(seen[0].kept)
    height = PANEL + (MOST_LINES + 1) * LINE + GAP
    sheet = Sheet(2 * MARGIN + WORDS + len(columns) * (PANEL + GAP), 2 * MARGIN + HEAD + len(seen) * height)
    said = {name: {_name(one): one.prediction for one in some} for name, some in answers.items()}
    sheet.write(MARGIN, MARGIN, f"{share} of the vision tokens kept", weight="bold")
    for number, name in enumerate(columns):
        sheet.write(_left(number), MARGIN, name, weight="bold")
    for number, one in enumerate(seen):
        _draw_row(sheet, one, MARGIN + HEAD + number * height, said)
    with writing(file):
        sheet.figure.savefig(file, dpi=DOTS_PER_INCH)


def _left(column: int) -> float:
    return MARGIN + WORDS + GAP + column * (PANEL + GAP)


def _name(prediction: Prediction) -> tuple[str, str]:
    return prediction.test_set, prediction.key


def _draw_row(sheet: Sheet, one: Seen, top: float, said: Mapping[str, Mapping[tuple[str, str], str]]) -> None:
    name, line = _name(one.question.unanswered), top
    texts = [(one.text, {}), (f"right: {one.question.unanswered.answer}", {"color": GREY})]
    texts += [
        (f"{way}: {of_way[name]}", {"color": GREY}) for way, of_way in said.items() if way not in one.kept
    ]
    for text, style in texts:
        for words in wrap(text, WORDS, max_lines=MOST_LINES + 1):
            sheet.write(MARGIN, line, words, **style)
            line += LINE
    for column, (selector, kept) in enumerate(one.kept.items()):
        draw_image(sheet.axes, dimmed(one.image, kept), Square(_left(column), top, PANEL))
        for number, words in enumerate(
            wrap(said[selector][name] or "(nothing)", PANEL, max_lines=MOST_LINES)
        ):
            sheet.write(_left(column), top + PANEL + 0.04 + number * LINE, words)
