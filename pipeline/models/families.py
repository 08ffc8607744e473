"""FAMILIES: the model families that are let in, and what of each differs from transformers' conventions.

A family is let in by its `model_type` and by the conformance suite (tests/test_families.py), not by code: most rows
are empty. `alignkd models check PATH` runs the suite's checks on any checkpoint, of a family in the table or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.models.image_batches import in_one_row, one_after_another, padded_tiles
from pipeline.positions import IGNORE_INDEX

# `token_type_ids` 'B S' of a batch, from its masks of vision tokens and its labels, both 'B S'.
TokenTypes = Callable[[Tensor, Tensor], Tensor]


def _images_are_one(is_vision: Tensor, labels: Tensor) -> Tensor:
    """Gemma 3: the tokens of an image see each other both ways."""
    return is_vision.long()


def _answers_are_one(is_vision: Tensor, labels: Tensor) -> Tensor:
    """PaliGemma: the prefix (images and question) sees itself both ways, the answer is causal."""
    return (labels != IGNORE_INDEX).long()


# PaliGemma was trained on one exchange: images, a first token, the question, a newline, the answer, a last token.
PALIGEMMA_TEMPLATE = (
    "{%- if messages | length > 2 -%}{{ raise_exception('PaliGemma takes one exchange') }}{%- endif -%}"
    "{%- for part in messages[0].content if part.type == 'image' -%}<image>{%- endfor -%}<bos>"
    "{%- for part in messages[0].content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{{ '\\n' }}"
    "{%- if messages | length == 2 -%}{{ messages[1].content[0].text }}<eos>{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """What of a family differs.

    `token_types`      makes `token_type_ids`, where the family reads them
    `trained_in_tower` modules inside the vision tower that belong to the projector: they are trained, it is not
    `join`             puts tensors of single images together, as `get_image_features` takes those of several
    `chat_template`    Jinja text, of a family whose checkpoints have none
    """

    token_types: TokenTypes | None = None
    trained_in_tower: tuple[str, ...] = ()
    join: Callable[[Sequence[Tensor]], Tensor] = one_after_another
    chat_template: str | None = None


FAMILIES: dict[str, Family] = {
    "mobilevlm": Family(),
    "llava": Family(),
    "llava_next": Family(join=padded_tiles),
    "internvl": Family(),
    "smolvlm": Family(join=in_one_row),
    "idefics3": Family(join=in_one_row),
    "qwen2_5_vl": Family(trained_in_tower=("merger",)),
    "qwen3_vl": Family(trained_in_tower=("merger", "deepstack_merger_list")),
    "gemma3": Family(token_types=_images_are_one),
    "paligemma": Family(token_types=_answers_are_one, chat_template=PALIGEMMA_TEMPLATE),
    "lfm2_vl": Family(),
}
