"""The log probability that a model gives a reference answer, after the prompt that it is asked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import ImageSize, Preparation, pad_tokens
from pipeline.data.templates import Turn
from pipeline.errors import BadSample
from pipeline.models.vlm import ImageFeatures, VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.targets.vocabulary import score_answers


@dataclass(frozen=True, slots=True)
class Reference:
    """The tokens that follow a prompt in a conversation with its answer, up to the answer's end mark.

    `labels` are those of the training: the ids, but for tokens that no model writes. Both are empty where the
    template cannot express the answer after this prompt, or where the sample is too long.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


NO_REFERENCE = Reference(np.empty(0, np.int32), np.empty(0, np.int32))


def reference_after(
    prompt: TokenizedSample, turns: Sequence[Turn], sizes: Sequence[ImageSize], preparation: Preparation
) -> Reference:
    """Return the reference that follows a prompt: the last answer of the conversation."""
    try:
        whole = preparation.tokenize(turns, sizes)
    except BadSample:
        return NO_REFERENCE
    length = len(prompt.input_ids)
    labels = np.array(whole.labels[length:], dtype=np.int32)
    if (
        whole.input_ids[:length] != prompt.input_ids
        or not (real := np.flatnonzero(labels != IGNORE_INDEX)).size
    ):
        return NO_REFERENCE
    end = int(real[-1]) + 1
    return Reference(np.array(whole.input_ids[length : length + end], dtype=np.int32), labels[:end])


@torch.no_grad()
def reference_log_probs(
    vlm: VisionLanguageModel,
    prompts: Sequence[TokenizedSample],
    references: Sequence[Reference],
    images: ImageFeatures | None,
    image_token_id: int,
) -> list[float | None]:
    """Return the summed log probability of each reference after its prompt; None for one without tokens."""
    counts = [reference.num_tokens for reference in references]
    if not sum(counts):
        return [None] * len(counts)
    samples = [
        TokenizedSample(
            (*prompt.input_ids, *map(int, reference.ids)),
            (*prompt.labels, *map(int, reference.labels)),
            prompt.sizes,
        )
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    batch = pad_tokens(samples, image_token_id)
    batch = {n: v.to(vlm.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    predicts = batch["labels"][:, 1:] != IGNORE_INDEX
    made = vlm.forward(batch, images, answers=torch.nn.functional.pad(predicts, (0, 1)))
    assert made.logits is not None
    scores = score_answers(made.logits, batch["labels"][:, 1:][predicts]).label.double().cpu()
    sums = [float(of_one.sum()) for of_one in scores.split(counts)]
    return [total if count else None for total, count in zip(sums, counts, strict=True)]
