"""The order in which the samples of a shard go through the teacher."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.conversation import TokenizedSample
from pipeline.data.shards import Sample


@dataclass(frozen=True)
class Prepared:
    """A sample ready for the teacher: its place in the shard, and its length in positions, vision tokens included."""

    place: int
    sample: Sample
    tokens: TokenizedSample
    length: int


def longest_first(items: Sequence[Prepared]) -> list[Prepared]:
    """Return the samples by falling length: batches need little padding, and memory runs out early or never.

    Samples of one image stay together, at the place of the longest, so that the vision tower runs once for them.
    """
    groups: dict[tuple[str, ...], list[Prepared]] = defaultdict(list)
    for item in items:
        # Samples without an image share nothing.
        groups[item.sample.image_digests[:1] or (f"place {item.place}",)].append(item)
    for group in groups.values():
        group.sort(key=lambda item: (-item.length, item.place))
    ordered = sorted(groups.values(), key=lambda group: (-group[0].length, group[0].place))
    return [item for group in ordered for item in group]
