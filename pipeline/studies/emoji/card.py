"""The card of the study's teacher, which is evaluated like any checkpoint on each held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.evaluation.evaluate import Prediction, accuracy_by_type, by_test_set
from pipeline.studies.cards import accuracy_table, commonest_answers
from pipeline.studies.emoji.scenes import QUESTIONS

CARD = Path(__file__).with_suffix(".md")


def write_card(
    file: Path,
    predictions: Sequence[Prediction],
    *,
    training_records: Sequence[Mapping[str, Any]],
    learned_sizes: Mapping[str, int],
    rank: int,
    held_out: int,
    num_scenes: int,
) -> str:
    """Write the card and return it.

    `learned_sizes` are numbers of parameters by tensor name. The baseline's answers are counted in
    `training_records`; the teacher saw `num_scenes` scenes.
    """
    commonest = commonest_answers(
        (record["question_type"], record["conversations"][-1]["value"]) for record in training_records
    )
    baseline = [replace(p, prediction=commonest[p.question_type]) for p in predictions]
    rows = {name: accuracy_by_type(answered) for name, answered in by_test_set(predictions).items()}
    rows["most frequent answer"] = accuracy_by_type(baseline)
    projector = sum(size for name, size in learned_sizes.items() if "mm_projector" in name)
    total = sum(learned_sizes.values())
    text = CARD.read_text().format(
        projector=projector,
        changes=total - projector,
        megabytes=2 * total / 1e6,
        rank=rank,
        held_out=held_out,
        scenes=num_scenes,
        questions=len(QUESTIONS) * num_scenes,
        table=accuracy_table(rows, decimals=1),
    )
    file.write_text(text)
    return text
