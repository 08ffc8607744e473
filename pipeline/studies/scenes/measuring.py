"""Measures how a base model answers with positions dropped on the way, all answers of an image in one forward.

The right answer is given as input, so an answer whose tokens are all predicted is exactly what greedy decoding gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.scenes.texts import QUESTIONS
from pipeline.studies.scenes.training import Lessons, answers_of
from pipeline.studies.shared_prefix import pack_questions

BATCH_SIZE = 20


@torch.inference_mode()
def exact_shares(
    model: MobileVLMForCausalLM, lessons: Lessons, keep_of: Callable[[Tensor], Mapping[int, Tensor]]
) -> dict[str, float]:
    """Return the share of exact answers to each type of question; `keep_of` maps ids to `keep` of `run_layers`."""
    exact: defaultdict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(lessons.asked), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        batch = pack_questions(lessons.asked[rows], model.config.num_vision_tokens)
        vision_tokens = model.model.mm_projector(lessons.features[rows].float())
        logits, targets, owner = answers_of(model, batch, vision_tokens, keep_of(batch.ids))
        hit = (logits.argmax(dim=1) == targets).float()
        for number, question in enumerate(QUESTIONS):
            mine = owner[:, 1] == number
            right = torch.ones(len(batch.ids)).scatter_reduce(0, owner[mine, 0], hit[mine], "amin")
            exact[question].append(right)
    return {question: torch.cat(some).mean().item() for question, some in exact.items()}
