"""Training of the projector to name what is in a cell, without running the language model.

The vision tokens of a cell move towards the mean input embeddings of its concept's name, its place and the
background's colour, and away in angle from other names, places and colours. With the place among the words, the
language model can find the top left by what a token says instead of by counting tokens. Takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.emoji.data import TEACHER_SETS, scenes_of
from pipeline.studies.emoji.scenes import BACKGROUNDS, PLACES, Concept, all_concepts
from pipeline.studies.training import fit

# The vision tokens of each of the 2 x 2 cells, in the grid of 4 x 4 tokens.
TOKENS_OF_CELLS = ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))
SHARPNESS = 20.0
# Weights of the place's and the colour's embeddings, which are added to the name's.
PLACE_SHARE, COLOUR_SHARE = 1.0, 0.5
EMPTY = "nothing"


@dataclass(frozen=True)
class Vocabulary:
    """Input embeddings of the words that describe scenes: `names`, `places` and `colours`, one row 'D' for each.

    The last name stands for an empty cell. `allowed` is False for names that no training scene shows.
    """

    names: Tensor
    places: Tensor
    colours: Tensor
    allowed: Tensor


def embed_words(
    model: MobileVLMForCausalLM, tokenizer: PreTrainedTokenizerBase, concepts: Sequence[Concept]
) -> Vocabulary:
    """Return the mean input embedding of every name, place and background, as words inside a sentence."""

    def embed(words: list[str]) -> Tensor:
        table = model.model.embed_tokens.weight.detach()
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return torch.stack([table[row].mean(dim=0) for row in ids])

    return Vocabulary(
        embed([*(concept.name for concept in concepts), EMPTY]),
        embed(list(PLACES)),
        embed(list(BACKGROUNDS)),
        torch.tensor([*(not concept.held_out for concept in concepts), True]),
    )


def facts_of_scenes() -> tuple[Tensor, Tensor]:
    """Return the names in the cells of the teacher's scenes, int64 'I 4' (the last for none), and backgrounds 'I'."""
    index = {concept: number for number, concept in enumerate(all_concepts())}
    shown = [scene for name, scenes in TEACHER_SETS.items() for _, scene, _ in scenes_of(name, scenes)]
    cells = torch.full((len(shown), 4), len(index))
    for row, scene in zip(cells, shown, strict=True):
        for thing in scene.things:
            row[thing.cell] = index[thing.concept]
    return cells, torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in shown])


def alignment_loss(tokens: Tensor, cells: Tensor, backgrounds: Tensor, words: Vocabulary) -> Tensor:
    """Return how far vision tokens 'I N D' are from the words of their cells.

    The angle separates a name, place or colour from the others (cross entropy); the squared distance sets the place.
    """
    names, places, tints = (w - w.mean(dim=0) for w in (words.names, words.places, words.colours))
    pooled = torch.stack([tokens[:, list(cell)].mean(dim=1) for cell in TOKENS_OF_CELLS], dim=1)
    by_name = SHARPNESS * _cosines(pooled, names).masked_fill(~words.allowed, -1e4)
    by_place = SHARPNESS * _cosines(pooled, places)
    by_colour = SHARPNESS * _cosines(tokens.mean(dim=1), tints)
    wanted = words.names[cells] + PLACE_SHARE * places + COLOUR_SHARE * tints[backgrounds][:, None]
    distance = (pooled - wanted).square().sum(dim=-1) / words.names.square().sum(dim=-1).mean()
    return (
        nn.functional.cross_entropy(by_name.flatten(0, 1), cells.flatten())
        + nn.functional.cross_entropy(by_place.flatten(0, 1), torch.arange(4).repeat(len(tokens)))
        + nn.functional.cross_entropy(by_colour, backgrounds)
        + distance.mean()
    )


def _cosines(rows: Tensor, words: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1) @ nn.functional.normalize(words, dim=-1).T


def align_projector(
    model: MobileVLMForCausalLM,
    features: Tensor,
    facts: tuple[Tensor, Tensor],
    words: Vocabulary,
    *,
    num_steps: int,
) -> None:
    """Step 1: train the projector on `features` 'I M W' of the teacher's scenes and their `facts_of_scenes`."""
    projector = model.model.mm_projector

    def loss_of(rows: Tensor) -> Tensor:
        cells, backgrounds = (fact[rows] for fact in facts)
        return alignment_loss(projector(features[rows]), cells, backgrounds, words)

    fit(
        projector.parameters(),
        loss_of,
        name="align",
        num_rows=len(features),
        batch_size=64,
        num_steps=num_steps,
        learning_rate=2e-3,
        generator=torch.Generator().manual_seed(1),
    )
