"""Measure whether the teacher's answers depend on the images: its log probabilities under right and swapped images.

A swap uses each sample's images once as the right ones and once as the wrong ones of another sample. So an image
under which all answers are likely adds nothing to the mean difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
import torch
from torch import Tensor

from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.shard_files import open_shard
from pipeline.data.shards import Sample, read_samples
from pipeline.errors import BadSample, ShardError
from pipeline.models.processors import Tensors
from pipeline.models.stub import Teacher
from pipeline.positions import IGNORE_INDEX
from pipeline.resampling import resampled_means
from pipeline.teacher_cache.blindness import MIN_PAIRS, Blindness
from pipeline.teacher_cache.capture import is_out_of_memory

MAX_SAMPLES = 48
MAX_SHARDS = 8  # from which the samples are taken in turns
MAX_READ = 500  # samples of a shard: more would take long where few have images
MAX_BATCH_SIZE = 8

Pair = tuple[Sample, Sample]  # a sample, and another one whose images are the wrong ones
Item = tuple[TokenizedSample, list[Tensors]]  # ids, and the pixels of the images in them


def measure_blindness(
    config: Config, shards: Sequence[str], preparation: Preparation, teacher: Teacher
) -> Blindness:
    """Compare the teacher's log probabilities of a few dozen answers with the right and with swapped images.

    The samples are the same on each call. One that cannot be used is left out; its capture reports why.
    """
    if teacher.plan.is_stub:
        return Blindness(0, not_measured="no logits are stored, so only a part of the teacher is loaded")
    with closing(_samples_in_turns(shards, preparation)) as samples:
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


# The samples, and whose images each gets


def _samples_in_turns(shards: Sequence[str], preparation: Preparation) -> Generator[Sample]:
    """Yield usable samples with images that no earlier one has, of shards spread over all, one of each in turn."""
    count, seen = min(MAX_SHARDS, len(shards)), set[str]()
    spread = [shards[number * len(shards) // count] for number in range(count)]
    with ExitStack() as stack:  # closes the shards, of which only the beginning is read
        streams = [stack.enter_context(closing(_usable(shard, preparation, seen))) for shard in spread]
        for turn in zip_longest(*streams):
            yield from (sample for sample in turn if sample is not None)


def _usable(shard: str, preparation: Preparation, seen: set[str]) -> Generator[Sample]:
    """Yield samples of the first `MAX_READ` that have images, all of them new; the images are added to `seen`."""
    try:
        with open_shard(shard) as opened:
            for item in islice(read_samples(opened, max_pixels=preparation.max_pixels), MAX_READ):
                if isinstance(item, Sample) and _is_new(item, seen) and _tokens(preparation, item, item):
                    seen.update(item.image_digests)
                    yield item
    except ShardError:
        return  # stage 1 reports a damaged shard, and leaves it out


def _is_new(sample: Sample, seen: Collection[str]) -> bool:
    return bool(sample.images) and not any(digest in seen for digest in sample.image_digests)


def _tokens(preparation: Preparation, sample: Sample, other: Sample) -> TokenizedSample | None:
    """Return the ids of a sample with another's images, None if they are too many, or without an answer."""
    try:
        tokens = preparation.tokenize(sample.conversations, preparation.sizes_of(other.images))
    except BadSample:
        return None
    return tokens if any(label != IGNORE_INDEX for label in tokens.labels[1:]) else None


def pairs_of(samples: Sequence[Sample]) -> list[Pair]:
    """Pair samples with others of as many images and other answers, each of which gives its images once."""
    by_number: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_number[len(sample.images)].append(sample)
    return [pair for alike in by_number.values() for pair in _pairs_of_one_number(alike)]


def _pairs_of_one_number(samples: Sequence[Sample]) -> list[Pair]:
    """Sort by answers, and shift the images by the number of the most frequent ones.

    Of answers that more than half of the samples give, some samples are left out.
    """
    by_answers: dict[tuple[str, ...], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_answers[_answers(sample)].append(sample)
    groups = sorted(by_answers.values(), key=len, reverse=True)
    shift = min(len(groups[0]), len(samples) - len(groups[0]))
    ordered = [sample for group in groups for sample in group[:shift]]
    return list(zip(ordered, ordered[shift:] + ordered[:shift], strict=True))


def _answers(sample: Sample) -> tuple[str, ...]:
    return tuple(turn["value"].strip() for turn in sample.conversations if turn["from"] == "gpt")


# The teacher's log probabilities


@dataclass(frozen=True)
class _Comparison:
    preparation: Preparation
    teacher: Teacher

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
        """Return the mean log probability of each sample's answer tokens, with the right and the wrong images."""
        both = [(self._item(sample, sample), self._item(sample, other)) for sample, other in pairs]
        return self._compare([(right, wrong) for right, wrong in both if right and wrong])

    def _item(self, sample: Sample, other: Sample) -> Item | None:
        """Return a sample with another's images, None if the two cannot be used together."""
        try:
            tokens = _tokens(self.preparation, sample, other)
            return tokens and (tokens, [self.preparation.preprocess(image) for image in other.images])
        except BadSample:
            return None

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
