"""Measure where a model looks as its answer begins: in each layer, how much on the image and on the asked cell.

The layers of `configs/emoji.yaml` were chosen so: the study knows which cell a question is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.studies.emoji.alignment import TOKENS_OF_CELLS
from pipeline.studies.emoji.scenes import PLACES

# Questions that name a place: "What is at the top left?"
ABOUT_A_CELL = ("name", "kind")


class Look(NamedTuple):
    """Means over questions, from 0 to 1: attention on the image, and the share of it on the asked cell."""

    on_image: float
    on_cell: float


def questions_about_cells(records: Path, num_questions: int) -> list[dict[str, Any]]:
    """Return the first records of a set that ask what is in a cell."""
    found = [r for r in json.loads(records.read_text()) if r["question_type"] in ABOUT_A_CELL]
    return found[:num_questions]


@torch.inference_mode()
def where_it_looks(
    model: MobileVLMForCausalLM, preparation: Preparation, records: Sequence[Mapping[str, Any]], images: Path
) -> list[Look]:
    """Return for each layer the mean over heads at the position that predicts the answer's first token."""
    samples = [preparation.tokenize(record["conversations"]) for record in records]
    batch = pad_tokens(samples, preparation.image_token_id)
    pixels = [preparation.preprocess((images / record["image"]).read_bytes()) for record in records]
    vlm = VisionLanguageModel(model)
    features = vlm.encode(pixels, [size for sample in samples for size in sample.sizes])
    seen = vlm.forward(batch, features, layers=range(len(model.model.layers)))
    before_answer = (batch["labels"] != IGNORE_INDEX).int().argmax(dim=1) - 1
    rows = (seen.slots.text == before_answer[:, None]).int().argmax(dim=1)
    cells = torch.tensor([TOKENS_OF_CELLS[_asked_cell(record)] for record in records])
    looks = []
    for attention in seen.attention.values():
        to_image = attention.mean(dim=1)[torch.arange(len(records)), rows]  # 'B N'
        on_image = to_image.sum(dim=1)
        on_cell = to_image.gather(1, cells).sum(dim=1) / on_image
        looks.append(Look(float(on_image.mean()), float(on_cell.mean())))
    return looks


def _asked_cell(record: Mapping[str, Any]) -> int:
    question = record["conversations"][0]["value"]
    return next(cell for cell, place in enumerate(PLACES) if place in question)
