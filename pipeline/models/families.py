"""FAMILIES: the model families that are let in, and what of each differs from transformers' conventions.

A family is let in by its `model_type` and by the conformance suite (tests/test_families.py), not by code: most rows are
empty. `alignkd models check PATH` runs the suite's checks on any checkpoint, of a family in the table or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.positions import IGNORE_INDEX

# `token_type_ids` 'B S' of a batch, from its masks of vision tokens and its labels, both 'B S'.
TokenTypes = Callable[[Tensor, Tensor], Tensor]


def _images_are_one(is_vision: Tensor, labels: Tensor) -> Tensor:
    """Gemma 3: the tokens of an image see each other both ways."""
    return is_vision.long()


def _answers_are_one(is_vision: Tensor, labels: Tensor) -> Tensor:
    """PaliGemma: the prefix (images and question) sees itself both ways, the answer is causal."""
    return (labels != IGNORE_INDEX).long()


@dataclass(frozen=True)
class Family:
    """What of a family differs.

    `token_types`      makes `token_type_ids`, where the family reads them
    `trained_in_tower` modules inside the vision tower that belong to the projector: they are trained, the tower is not
    """

    token_types: TokenTypes | None = None
    trained_in_tower: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "mobilevlm": Family(),
    "llava": Family(),
    "llava_next": Family(),
    "internvl": Family(),
    "smolvlm": Family(),
    "idefics3": Family(),
    "qwen2_5_vl": Family(trained_in_tower=("merger",)),
    "qwen3_vl": Family(trained_in_tower=("merger", "deepstack_merger_list")),
    "gemma3": Family(token_types=_images_are_one),
    "paligemma": Family(token_types=_answers_are_one),
    "lfm2_vl": Family(),
}
