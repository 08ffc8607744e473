"""Training on all questions about an image in one sequence, which share the prompt and the vision tokens.

A question attends to that prefix and to itself, never to another question, and has the positions of a sample of its
own. The loss is that of one sample for each question, at a quarter of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.data.conversation import tokenize
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.positions import IGNORE_INDEX


@dataclass(frozen=True)
class ImageQuestions:
    """An image's questions: the ids that all of them begin with, and each question's further ids and labels."""

    image: str
    prefix: tuple[int, ...]
    branches: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def group_by_image(
    records: Sequence[dict], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> list[ImageQuestions]:
    """Tokenise single-question conversations, and split them where the prefix ends that all records share."""
    grouped: dict[str, list] = {}
    for record in records:
        sample = tokenize(record["conversations"], tokenizer, template=template)
        grouped.setdefault(record["image"], []).append(sample)
    columns = zip(*(sample.input_ids for samples in grouped.values() for sample in samples), strict=False)
    cut = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return [
        ImageQuestions(
            image,
            tuple(samples[0].input_ids[:cut]),
            tuple((tuple(s.input_ids[cut:]), tuple(s.labels[cut:])) for s in samples),
        )
        for image, samples in grouped.items()
    ]


def shared_prefix_row(item: ImageQuestions, num_vision_tokens: int) -> list[tuple[int, int, int, int]]:
    """Return (id, label, owner, position) of every merged position.

    A vision token has the id -200. The owner is the number of the question, or -1 for the prefix.
    """
    at = item.prefix.index(IMAGE_TOKEN_ID)
    ids = [*item.prefix[:at], *[IMAGE_TOKEN_ID] * num_vision_tokens, *item.prefix[at + 1 :]]
    row = [(token, IGNORE_INDEX, -1, position) for position, token in enumerate(ids)]
    for owner, (branch, labels) in enumerate(item.branches):
        pairs = zip(branch, labels, strict=True)
        row += [(token, label, owner, len(ids) + n) for n, (token, label) in enumerate(pairs)]
    return row


@dataclass(frozen=True)
class PackedQuestions:
    """Rows of `shared_prefix_row` as a batch: int64 'B S', and `seen` bool 'B S S', what a position attends to."""

    ids: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    position: torch.Tensor
    seen: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        """The label that each position predicts, int64 'B S'."""
        return nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def pack_questions(chosen: Sequence[ImageQuestions], num_vision_tokens: int) -> PackedQuestions:
    """Return the questions of some images as a batch; padding has the owner -2."""
    rows = [shared_prefix_row(item, num_vision_tokens) for item in chosen]
    length = max(map(len, rows))
    padding = (0, IGNORE_INDEX, -2, 0)  # no question has the owner -2
    columns = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    ids, labels, owner, position = columns.unbind(dim=2)
    order = torch.arange(length)
    seen = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    return PackedQuestions(ids, labels, owner, position, seen & (order <= order[:, None]))


def answer_loss(
    model: MobileVLMForCausalLM, chosen: Sequence[ImageQuestions], patch_features: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross entropy over the answers to all questions of some images; `patch_features` 'I M W'."""
    batch = pack_questions(chosen, model.config.num_vision_tokens)
    hidden = model.model(
        inputs_embeds=model.embed(
            batch.ids, model.get_image_features(patch_features=patch_features).pooler_output
        ),
        attention_mask=batch.seen[:, None],
        position_ids=batch.position,
        use_cache=False,
    ).last_hidden_state
    answers = batch.targets != IGNORE_INDEX
    return nn.functional.cross_entropy(model.lm_head(hidden[answers]), batch.targets[answers])
