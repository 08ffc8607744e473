"""A training sample: its image and text from a shard, its targets from a store, compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from cache import SampleEntry, Store
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation
from pipeline.data.shard_identity import check_unchanged
from pipeline.data.shard_kinds import part_name
from pipeline.data.spans import ReadSpan, SpanReader, read_span
from pipeline.distill.join.stored_tokens import TOKENS, pop_tokens
from pipeline.distill.join.stores import Source
from pipeline.distill.join.text import CHANGED, compare_text
from pipeline.errors import JoinError
from pipeline.models.processors import Tensors
from pipeline.targets.target import Arrays, Target


@dataclass(frozen=True)
class JoinedSample:
    """A training sample: tokens, pixels of its images by digest, and the stored arrays of its targets.

    Arrays of the targets in `lacking` are zeros: no store gave them, and they are recomputed during training.
    """

    key: str
    tokens: TokenizedSample
    pixels: dict[str, Tensors]
    image_digests: tuple[str, ...]
    arrays: Arrays
    lacking: frozenset[str] = frozenset()
    is_filler: bool = False  # see `RankBatches`


def join_sample(
    store: Store, shard: str, entry: SampleEntry, preparation: Preparation, targets: Mapping[str, Target]
) -> JoinedSample:
    """Return one sample, compared with its shard as in `JoinedDataset`; its text only if there is a tokenizer."""
    read = SpanReader().holding((shard, span) for span in (entry.json_span, *entry.image_spans))
    check_unchanged([store], {part_name(shard): shard})
    arrays = store.read(entry.key, [*TOKENS, *Source(store, tuple(targets)).arrays(targets)])
    tokens = pop_tokens(arrays, entry, store.manifest)
    if preparation.tokenizer is not None:
        compare_text(shard, entry, tokens, preparation, read=read)
    pixels = {
        digest: read_pixels(shard, entry, number, preparation, read=read)
        for number, digest in enumerate(entry.images)
    }
    return JoinedSample(entry.key, tokens, pixels, entry.images, by_image(arrays, targets, len(entry.images)))


def by_image(arrays: Arrays, targets: Mapping[str, Target], num_images: int) -> Arrays:
    """Return a sample's arrays with those of its images as lists of blocks; a store of format 1 has one array."""
    for name in {name for target in targets.values() for name in target.of_images()} & arrays.keys():
        if isinstance(array := arrays[name], np.ndarray):
            arrays[name] = np.array_split(array, num_images) if num_images else []
    return arrays


def read_pixels(
    shard: str, entry: SampleEntry, number: int, preparation: Preparation, *, read: ReadSpan = read_span
) -> Tensors:
    """Return the pixel inputs of an image of a sample; raises `JoinError` unless its digest is the stored one."""
    span, digest = entry.image_spans[number], entry.images[number]
    data = read(shard, span)
    if (found := blake3(data).hexdigest()) != digest:
        raise JoinError(
            f"sample {entry.key!r} of {shard}: image {span.file!r} has digest {found[:16]}, "
            f"the teacher saw {digest[:16]}; {CHANGED}"
        )
    return preparation.preprocess(data)
