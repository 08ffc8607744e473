"""A training sample: its image and text from a shard, its targets from a store, compared with each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from cache import SampleEntry, Store
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation
from pipeline.data.shard_identity import check_unchanged
from pipeline.data.shards import parse_record, part_name, read_span
from pipeline.distill.join.stores import TOKENS, Source, first_difference
from pipeline.errors import BadSample, JoinError
from pipeline.targets.target import Target

CHANGED = (
    "the shard changed after it was cached: restore it, or run `alignkd teacher-cache --recapture-changed`"
)


@dataclass(frozen=True)
class JoinedSample:
    """A training sample: tokens, pixels of its images by digest, and the stored arrays of its targets.

    Arrays of the targets in `lacking` are zeros: no store gave them, and they are recomputed during training.
    """

    key: str
    tokens: TokenizedSample
    pixels: dict[str, torch.Tensor]
    image_digests: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    lacking: frozenset[str] = frozenset()
    is_filler: bool = False  # see `RankBatches`


def join_sample(
    store: Store, shard: str, entry: SampleEntry, preparation: Preparation, targets: Mapping[str, Target]
) -> JoinedSample:
    """Return one sample, compared with its shard as in `JoinedDataset`; its text only if there is a tokenizer."""
    check_unchanged([store], {part_name(shard): shard})
    arrays = store.read(entry.key, [*TOKENS, *Source(store, tuple(targets)).arrays(targets)])
    tokens = pop_tokens(arrays)
    if preparation.tokenizer is not None:
        compare_text(shard, entry, tokens, preparation)
    pixels = {
        digest: read_pixels(shard, entry, number, preparation) for number, digest in enumerate(entry.images)
    }
    arrays["num_images"] = np.array(len(entry.images))
    return JoinedSample(entry.key, tokens, pixels, entry.images, arrays)


def pop_tokens(arrays: dict[str, np.ndarray]) -> TokenizedSample:
    """Take the token ids and labels out of a sample's stored arrays."""
    return TokenizedSample(tuple(arrays.pop("input_ids").tolist()), tuple(arrays.pop("labels").tolist()))


def compare_text(shard: str, entry: SampleEntry, stored: TokenizedSample, preparation: Preparation) -> None:
    """Raise `JoinError` unless a sample's text in the shard gives the stored ids and labels."""
    try:
        record = parse_record(read_span(shard, entry.json_span))
        mine = preparation.tokenize(record.get("conversations"))  # pyright: ignore[reportArgumentType]
    except BadSample as error:
        raise JoinError(
            f"sample {entry.key!r} of {shard}: {entry.json_span.file!r} holds no usable text "
            f"({error.reason}), the teacher saw some; {CHANGED}"
        ) from error
    for what, theirs, ours in (
        ("token ids", stored.input_ids, mine.input_ids),
        ("labels", stored.labels, mine.labels),
    ):
        if theirs != ours:
            raise JoinError(
                f"sample {entry.key!r} of {shard}: its {what} are not those that the teacher saw "
                f"({first_difference(theirs, ours)}); {CHANGED}"
            )


def read_pixels(shard: str, entry: SampleEntry, number: int, preparation: Preparation) -> torch.Tensor:
    """Return an image of a sample as float32 'C Y X'; raises `JoinError` unless its digest is the stored one."""
    span, digest = entry.image_spans[number], entry.images[number]
    data = read_span(shard, span)
    if (found := blake3(data).hexdigest()) != digest:
        raise JoinError(
            f"sample {entry.key!r} of {shard}: image {span.file!r} has digest {found[:16]}, "
            f"the teacher saw {digest[:16]}; {CHANGED}"
        )
    return preparation.preprocess(data)
