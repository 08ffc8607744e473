"""Training of the projector to name what is in a cell and where it is, without running the language model.

Each vision token is to be nearest, by inner product, to the embedding of its cell's name (or of the background's
colour, in an empty cell), of its row and of its column. With the place among the words, the language model can find
the top left by what a token says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.emoji.scenes import Scene
from pipeline.studies.scenes.dropping import cells_of_tokens
from pipeline.studies.scenes.scenes import COLOURS, COLUMNS, GRID, ROWS, all_concepts
from pipeline.studies.training import fit

SHARPNESS = 4.0


@dataclass(frozen=True)
class Saying:
    """A list of words, one of which a vision token should say: their ids, and the right ones, int64 'I N' or 'N'."""

    ids: list[int]
    right: Tensor


def sayings_of(scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerBase, *, side: int) -> list[Saying]:
    """Return what the vision tokens of some scenes should say: a name or colour, a row, a column."""
    names = [*(concept.name for concept in all_concepts()), *COLOURS]
    cells = torch.tensor([[names.index(scene.background)] * GRID**2 for scene in scenes])
    for row, scene in zip(cells, scenes, strict=True):
        for thing in scene.things:
            row[thing.cell] = names.index(thing.concept.name)
    places = cells_of_tokens(side)
    lists = ((names, cells[:, places]), (ROWS, places // GRID), (COLUMNS, places % GRID))
    return [Saying([_id_of(word, tokenizer) for word in words], right) for words, right in lists]


def _id_of(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    (number,) = tokenizer(word, add_special_tokens=False).input_ids
    return number


def alignment_scores(tokens: Tensor, words: Tensor) -> Tensor:
    """Return how much vision tokens 'I N D' say each of some words 'W D': 'I N W'."""
    return SHARPNESS * tokens @ words.T


def align_projector(
    model: MobileVLMForCausalLM, features: Tensor, sayings: Sequence[Saying], *, num_steps: int
) -> None:
    """Train the projector alone; `features` 'I M W' are in the order of the scenes of `sayings`."""
    projector, table = model.model.mm_projector, model.model.embed_tokens.weight.detach()

    def loss_of(rows: Tensor) -> Tensor:
        tokens = projector(features[rows].float())
        losses = []
        for saying in sayings:
            scores = alignment_scores(tokens, table[saying.ids])
            right = saying.right[rows] if saying.right.dim() == 2 else saying.right.expand(len(rows), -1)
            losses.append(nn.functional.cross_entropy(scores.flatten(0, 1), right.flatten()))
        return torch.stack(losses).sum()

    fit(
        projector.parameters(),
        loss_of,
        name="projector",
        num_rows=len(features),
        batch_size=64,
        num_steps=num_steps,
        generator=torch.Generator().manual_seed(1),
        learning_rate=2e-3,
    )
