"""WebDataset tars to samples, each with the place of its bytes in the tar.

A sample is a run of members with one key: KEY.json, and KEY.jpg for one image, or KEY.0.jpg, KEY.1.jpg, ...
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import Span
from pipeline.data.decoding import ENDINGS, MAX_IMAGE_PIXELS, read_header
from pipeline.data.dialogues import read_dialogue
from pipeline.data.shard_files import OpenShard, open_shard
from pipeline.data.tars import Group, read_as_tar, read_groups, read_member
from pipeline.data.templates import Turn
from pipeline.errors import BadSample


@dataclass(frozen=True)
class Sample:
    """A conversation with the bytes of its image files, in the order of their "<image>".

    `image_digests` are blake3 of those bytes; `metadata` holds the other fields of the JSON.
    """

    key: str
    conversations: list[dict[str, str]]
    images: tuple[bytes, ...]
    image_digests: tuple[str, ...]
    image_spans: tuple[Span, ...]
    json_span: Span
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


def read_shard(path: str | Path, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Sample | Rejected]:
    """Yield every sample of a shard in order, unusable ones as `Rejected`; one sample is in memory at a time.

    The shard is a file, a URL or a command (see `open_shard`). Raises `ShardError` if it is truncated or damaged, at
    the latest after the last sample: the samples yielded until then are not a whole shard.
    """
    with open_shard(path) as shard:
        yield from read_samples(shard, max_pixels=max_pixels)


def read_samples(shard: OpenShard, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Sample | Rejected]:
    """Yield every sample of an open shard, as `read_shard` does."""
    seen: set[str] = set()
    tar = read_as_tar(shard.file, shard.shard)
    for group in read_groups(tar, shard.shard):
        if group.key in seen:
            group.problem = BadSample("key occurs twice in this shard", "its members must be side by side")
        seen.add(group.key)
        try:
            yield _sample(group, tar, max_pixels=max_pixels)
        except BadSample as error:
            yield Rejected(group.key, error.reason)


# Groups to samples


def _sample(group: Group, tar: tarfile.TarFile, *, max_pixels: int) -> Sample:
    if group.problem is not None:
        raise group.problem
    if "json" not in group.members:
        found = f"found {', '.join(sorted(group.members))}"
        if any("." in ending for ending in group.members):
            found += f"; the ending of {next(iter(group.members.values())).name} begins at its first dot"
        raise BadSample("no JSON file", found)
    record = parse_record(read_member(tar, group.members["json"]))
    members = _image_members(group)
    dialogue = read_dialogue(record, members)
    images = tuple(read_member(tar, member) for member in members)
    for image in images:
        read_header(image, max_pixels=max_pixels)
    return Sample(
        key=group.key,
        conversations=dialogue.turns,
        images=images,
        image_digests=tuple(blake3(image).hexdigest() for image in images),
        image_spans=tuple(_span(member) for member in members),
        json_span=_span(group.members["json"]),
        metadata=dialogue.metadata(record),
    )


def parse_turns(data: bytes, *, num_images: int) -> list[Turn]:
    """Return the turns of a sample's JSON, with an <image> for each of its images; raises `BadSample` without."""
    return read_dialogue(parse_record(data), range(num_images)).turns


def parse_record(data: bytes) -> dict[str, Any]:
    """Return a sample's JSON object; raises `BadSample` for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON", str(error)) from error
    if not isinstance(record, dict):
        raise BadSample("JSON is no object", type(record).__name__)
    return record


def _image_members(group: Group) -> list[tarfile.TarInfo]:
    """Return KEY.jpg, or KEY.0.jpg, KEY.1.png, ... by their numbers; KEY.mask.png is no image of the sample."""
    single: list[tarfile.TarInfo] = []
    numbered: dict[int, tarfile.TarInfo] = {}
    for ending, member in group.members.items():
        number, _, kind = ending.rpartition(".")
        if kind not in ENDINGS:
            continue
        if number == "":
            single.append(member)
        elif re.fullmatch("[0-9]{1,6}", number):
            if int(number) in numbered:
                raise BadSample("two images have one number", member.name)
            numbered[int(number)] = member
    if len(single) > 1 or (single and numbered):
        raise BadSample("several images without an order", "name them KEY.0.jpg, KEY.1.jpg, ...")
    if sorted(numbered) != list(range(len(numbered))):
        raise BadSample("images not numbered 0, 1, ...", f"found {', '.join(map(str, sorted(numbered)))}")
    return single or [numbered[number] for number in sorted(numbered)]


def _span(member: tarfile.TarInfo) -> Span:
    return Span(file=member.name, offset=member.offset_data, size=member.size)
