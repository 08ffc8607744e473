"""Where a model looks as its answer begins: layer by layer, how much on the image, and how much of it where asked.

This is how the layers of `configs/emoji.yaml` were chosen: the study knows which cell a question is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.tap import attention_of_layers, record_layer_inputs
from pipeline.positions import IGNORE_INDEX
from pipeline.studies.emoji.alignment import TOKENS_OF_CELLS
from pipeline.studies.emoji.scenes import PLACES

# Questions that name a place: "What is at the top left?"
ABOUT_A_CELL = ("name", "kind")


@dataclass(frozen=True)
class Look:
    """Means over questions, shares from 0 to 1: attention on the image, and of that the part on the asked cell."""

    on_image: float
    on_cell: float


def questions_about_cells(records: Path, num_questions: int) -> list[dict[str, Any]]:
    """The first records of a set that ask what is in a cell."""
    found = [r for r in json.loads(records.read_text()) if r["question_type"] in ABOUT_A_CELL]
    return found[:num_questions]


@torch.inference_mode()
def where_it_looks(
    model: MobileVLMForCausalLM, preparation: Preparation, records: Sequence[Mapping[str, Any]], images: Path
) -> list[Look]:
    """For each layer, the mean over heads at the position that predicts the first token of the answer."""
    batch = pad_tokens([preparation.tokenize(record["conversations"]) for record in records])
    pixels = torch.stack(
        [preparation.preprocess((images / record["image"]).read_bytes()) for record in records]
    )
    merged = model.merge_inputs(
        batch["input_ids"],
        model.encode_images(pixels),
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    )
    with record_layer_inputs(model.model.layers, range(len(model.model.layers))) as inputs:
        model.model(
            inputs_embeds=merged.inputs_embeds, attention_mask=merged.attention_mask.long(), use_cache=False
        )
    before_answer = (merged.labels != IGNORE_INDEX).int().argmax(dim=1) - 1
    rows = (merged.slots.text == before_answer[:, None]).int().argmax(dim=1)
    cells = torch.tensor([TOKENS_OF_CELLS[_asked_cell(record)] for record in records])
    each = torch.arange(len(records))
    attention = attention_of_layers(model.model, inputs, merged)
    return [_look(of_layer.mean(dim=1)[each, rows], cells) for of_layer in attention.values()]


def _look(rows: Tensor, cells: Tensor) -> Look:
    """`rows` 'B N', the attention of one text position to the vision tokens; `cells` the asked ones, 'B 4'."""
    on_image = rows.sum(dim=1)
    on_cell = rows.gather(1, cells).sum(dim=1) / on_image
    return Look(float(on_image.mean()), float(on_cell.mean()))


def _asked_cell(record: Mapping[str, Any]) -> int:
    question = record["conversations"][0]["value"]
    return next(cell for cell, place in enumerate(PLACES) if place in question)
