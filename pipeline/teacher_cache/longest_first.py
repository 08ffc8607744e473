"""The order in which a shard's samples go through the teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.conversation import TokenizedSample
from pipeline.data.shards import Sample


@dataclass(frozen=True)
class Prepared:
    """A sample ready for the teacher: its place in the shard, and its positions with vision tokens."""

    place: int
    sample: Sample
    tokens: TokenizedSample
    length: int


def longest_first(items: Sequence[Prepared]) -> list[Prepared]:
    """By falling length, so that a batch is of like lengths and memory runs out at the start, if it does.

    Samples of one image stay side by side, at the place of their longest: the tower then runs once for them.
    """
    groups: dict[tuple[str, ...], list[Prepared]] = defaultdict(list)
    for item in items:
        # Of a sample without an image nothing is shared.
        groups[item.sample.image_digests[:1] or (f"place {item.place}",)].append(item)
    for group in groups.values():
        group.sort(key=lambda item: (-item.length, item.place))
    ordered = sorted(groups.values(), key=lambda group: (-group[0].length, group[0].place))
    return [item for group in ordered for item in group]
