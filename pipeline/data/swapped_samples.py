"""Samples with images, in pairs of which each can get the other's images: to measure what images and questions do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import ExitStack, closing
from itertools import islice, zip_longest

from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation
from pipeline.data.shard_files import open_shard
from pipeline.data.shards import Sample, read_samples
from pipeline.errors import BadSample, ShardError
from pipeline.models.processors import Tensors
from pipeline.positions import IGNORE_INDEX

MAX_SHARDS = 8  # from which the samples are taken in turns
MAX_READ = 500  # samples of a shard: more would take long where few have images

Pair = tuple[Sample, Sample]  # a sample, and another one whose images are the wrong ones
Item = tuple[TokenizedSample, list[Tensors]]  # ids, and the pixels of the images in them


def samples_in_turns(
    shards: Sequence[str], preparation: Preparation, *, only_new: bool = True
) -> Generator[Sample]:
    """Yield usable samples with images, of shards spread over all, one of each in turn.

    `only_new` leaves out those with an image that an earlier one has.
    """
    count, seen = min(MAX_SHARDS, len(shards)), set[str]() if only_new else None
    spread = [shards[number * len(shards) // count] for number in range(count)]
    with ExitStack() as stack:  # closes the shards, of which only the beginning is read
        streams = [stack.enter_context(closing(_usable(shard, preparation, seen))) for shard in spread]
        for turn in zip_longest(*streams):
            yield from (sample for sample in turn if sample is not None)


def _usable(shard: str, preparation: Preparation, seen: set[str] | None) -> Generator[Sample]:
    """Yield samples of the first `MAX_READ` that have images, all of them new; the images are added to `seen`.

    Without `seen` the images need not be new.
    """
    try:
        with open_shard(shard) as opened:
            for item in islice(read_samples(opened, max_pixels=preparation.max_pixels), MAX_READ):
                if not isinstance(item, Sample) or not _is_new(item, seen or ()):
                    continue
                if tokens_with(preparation, item, item):
                    if seen is not None:
                        seen.update(item.image_digests)
                    yield item
    except ShardError:
        return  # stage 1 reports a damaged shard, and leaves it out


def _is_new(sample: Sample, seen: Collection[str]) -> bool:
    return bool(sample.images) and not any(digest in seen for digest in sample.image_digests)


def tokens_with(preparation: Preparation, sample: Sample, other: Sample) -> TokenizedSample | None:
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


def with_images_of(preparation: Preparation, sample: Sample, other: Sample) -> Item | None:
    """Return a sample with another's images, None if the two cannot be used together."""
    try:
        tokens = tokens_with(preparation, sample, other)
        return tokens and (tokens, [preparation.preprocess(image) for image in other.images])
    except BadSample:
        return None
