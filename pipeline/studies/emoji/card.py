"""The card of the study's teacher, which is evaluated like any checkpoint on each held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.evaluation.predictions import Prediction, by_test_set
from pipeline.studies.cards import most_frequent_answers, write_card
from pipeline.studies.emoji.data import TEACHER_SETS
from pipeline.studies.emoji.scenes import QUESTIONS, all_concepts


def write_emoji_card(
    file: Path,
    predictions: Sequence[Prediction],
    *,
    training_records: Sequence[Mapping[str, Any]],
    learned: Mapping[str, Tensor],
) -> None:
    (
        """Write the card: a row for each test set, and one for the most frequent answers in `training_records`."""
        ""
    )
    frequent = most_frequent_answers(
        (record["question_type"], record["conversations"][-1]["value"]) for record in training_records
    )
    baseline = [replace(p, prediction=frequent[p.question_type]) for p in predictions]
    total = sum(value.numel() for value in learned.values())
    projector = sum(value.numel() for name, value in learned.items() if "mm_projector" in name)
    num_scenes = sum(scenes.num_images for scenes in TEACHER_SETS.values())
    write_card(
        file,
        Path(__file__).with_suffix(".md"),
        {**by_test_set(predictions), "most frequent answer": baseline},
        decimals=1,
        projector=projector,
        changes=total - projector,
        megabytes=2 * total / 1e6,
        rank=next(len(value) for name, value in learned.items() if name.endswith(".lora_A")),
        held_out=sum(concept.held_out for concept in all_concepts()),
        scenes=num_scenes,
        questions=len(QUESTIONS) * num_scenes,
    )
