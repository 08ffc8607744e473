"""Measure whether the teacher's answers depend on the images: its log probabilities under right and swapped images.

A swap uses each sample's images once as the right ones and once as the wrong ones of another sample. So an image
under which all answers are likely adds nothing to the mean difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pipeline.config.config import Config
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.swapped_samples import Item, Pair, pairs_of, samples_in_turns, with_images_of
from pipeline.models.stub import Teacher
from pipeline.positions import IGNORE_INDEX
from pipeline.resampling import resampled_means
from pipeline.teacher_cache.blindness import MIN_PAIRS, Blindness
from pipeline.teacher_cache.capture import is_out_of_memory

MAX_SAMPLES = 48
MAX_BATCH_SIZE = 8


def measure_blindness(
    config: Config, shards: Sequence[str], preparation: Preparation, teacher: Teacher
) -> Blindness:
    """Compare the teacher's log probabilities of a few dozen answers with the right and with swapped images.

    The samples are the same on each call. One that cannot be used is left out; its capture reports why.
    """
    if teacher.plan.is_stub:
        return Blindness(0, not_measured="no logits are stored, so only a part of the teacher is loaded")
    with closing(samples_in_turns(shards, preparation)) as samples:
        pairs = pairs_of(list(islice(samples, MAX_SAMPLES)))
    if len(pairs) < MIN_PAIRS:
        return Blindness(len(pairs), not_measured=_too_few(len(pairs), "with images and different answers"))
    asked = config.teacher.batch_size
    size = MAX_BATCH_SIZE if asked == "auto" else min(asked, MAX_BATCH_SIZE)
    comparison = _Comparison(preparation, teacher)
    batches = (pairs[start : start + size] for start in range(0, len(pairs), size))
    compared = [two for batch in batches for two in comparison.of(batch)]
    found = np.array([two for two in compared if np.isfinite(two).all()]).reshape(-1, 2)
    if len(found) < MIN_PAIRS:
        return Blindness(len(found), not_measured=_too_few(len(found), "that the teacher could read twice"))
    return _blindness(found)


def _too_few(number: int, which: str) -> str:
    return f"{number} samples {which} were found, and {MIN_PAIRS} are needed"


def _blindness(log_probs: np.ndarray) -> Blindness:
    """Return the result of log probabilities 'pairs 2', with the right and with the wrong images."""
    advantages = log_probs[:, 0] - log_probs[:, 1]
    means = resampled_means(advantages[None], np.ones(len(advantages)), seed=0)
    low, high = np.quantile(means, [0.025, 0.975])
    right, wrong = log_probs.mean(axis=0)
    return Blindness(
        pairs=len(log_probs),
        right=float(right),
        wrong=float(wrong),
        advantage=float(advantages.mean()),
        low=float(low),
        high=float(high),
        right_wins=int((advantages > 0).sum()),
    )


# The teacher's log probabilities


@dataclass(frozen=True)
class _Comparison:
    preparation: Preparation
    teacher: Teacher

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Return the mean log probability of each sample's answer tokens, with the right and the wrong images."""
        both = [
            (
                with_images_of(self.preparation, sample, sample),
                with_images_of(self.preparation, sample, other),
            )
            for sample, other in pairs
        ]
        return self._compare([(right, wrong) for right, wrong in both if right and wrong])

    def _compare(self, read: Sequence[tuple[Item, Item]]) -> list[tuple[float, float]]:
        """Where memory runs out, continue with halves; a single sample that does not fit is left out."""
        if not read:
            return []
        try:
            right, wrong = (self._log_probs(items) for items in zip(*read, strict=True))
            return list(zip(right, wrong, strict=True))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(read) // 2
        return self._compare(read[:half]) + self._compare(read[half:]) if half else []

    def _log_probs(self, items: Sequence[Item]) -> list[float]:
        """Return the mean log probability of each item's answer tokens."""
        tokens = [one for one, _ in items]
        images = [image for _, of_item in items for image in of_item]
        sizes = [size for one in tokens for size in one.sizes]
        batch = pad_tokens(tokens, self.preparation.image_token_id)
        forward = self.teacher.forward(batch, self.teacher.encode_images(images, sizes))
        assert forward.answer_logits is not None
        labels = batch["labels"][:, 1:]
        answers = labels[labels != IGNORE_INDEX].to(forward.answer_logits.device)
        log_probs = _log_probs_of(forward.answer_logits, answers)
        return [float(of_item.mean()) for of_item in log_probs.split(list(forward.num_answers))]


def _log_probs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log probability of one id a row, from logits 'A V': float32 'A', on the CPU."""
    return logits.float().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0].cpu()
