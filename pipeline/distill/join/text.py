"""The text of a sample as the student reads it, compared with what the teacher saw."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from cache import SampleEntry
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation
from pipeline.data.shards import parse_turns
from pipeline.data.spans import ReadSpan, read_span
from pipeline.distill.join.stores import first_difference
from pipeline.errors import BadSample, JoinError
from pipeline.positions import IGNORE_INDEX

CHANGED = (
    "the shard changed after it was cached: restore it, or run `alignkd teacher-cache --recapture-changed`"
)
# What of a sample's tokens a target is aligned with, besides its images.
ALIGNED_WITH = {
    "attention": ("token ids", "numbers of vision tokens"),
    "vision": ("numbers of vision tokens",),
    "logits": ("answers",),
    "hidden_states": ("token ids", "numbers of vision tokens"),
    "final_hidden": ("answers",),
    "query_attention": ("token ids", "numbers of vision tokens"),
}


def compare_text(
    shard: str,
    entry: SampleEntry,
    stored: TokenizedSample,
    preparation: Preparation,
    *,
    read: ReadSpan = read_span,
) -> None:
    """Raise `JoinError` unless a sample's text in the shard gives the stored ids and labels."""
    mine = _read(shard, entry, preparation, read)
    for what, theirs, ours in (
        ("token ids", stored.input_ids, mine.input_ids),
        ("labels", stored.labels, mine.labels),
        ("numbers of vision tokens", stored.sizes, mine.sizes),
    ):
        if theirs != ours:
            raise JoinError(
                f"sample {entry.key!r} of {shard}: its {what} are not those that the teacher saw "
                f"({first_difference(theirs, ours)}); {CHANGED}"
            )


def own_text(
    shard: str,
    entry: SampleEntry,
    stored: TokenizedSample,
    preparation: Preparation,
    targets: Collection[str],
    *,
    read: ReadSpan = read_span,
) -> TokenizedSample:
    """Return a sample's tokens as the student reads them, where it reads in another way than the teacher did.

    Raises `JoinError` unless what the targets are aligned with is the same for both.
    """
    mine = _read(shard, entry, preparation, read)
    for target in targets:
        for what in ALIGNED_WITH[target]:
            theirs, ours = _parts(stored)[what], _parts(mine)[what]
            if theirs != ours:
                raise JoinError(
                    f"sample {entry.key!r} of {shard}: the target {target!r} needs its {what} to be those that the "
                    f"teacher saw, but the student reads it in another way ({first_difference(theirs, ours)}); "
                    f"remove the losses that read {target!r}, or use a student that reads as the teacher does"
                )
    return mine


def _parts(tokens: TokenizedSample) -> dict[str, tuple[int, ...]]:
    answers = tuple(label for label in tokens.labels if label != IGNORE_INDEX)
    return {"token ids": tokens.input_ids, "numbers of vision tokens": tokens.sizes, "answers": answers}


def _read(shard: str, entry: SampleEntry, preparation: Preparation, read: ReadSpan) -> TokenizedSample:
    try:
        turns = parse_turns(read(shard, entry.json_span), num_images=len(entry.images))
        sizes = preparation.sizes_of([partial(read, shard, span) for span in entry.image_spans])
        return preparation.tokenize(turns, sizes)
    except BadSample as error:
        raise JoinError(
            f"sample {entry.key!r} of {shard}: {entry.json_span.file!r} holds no usable text "
            f"({error.reason}), the teacher saw some; {CHANGED}"
        ) from error
