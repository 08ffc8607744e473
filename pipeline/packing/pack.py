"""LLaVA annotations and an image folder to WebDataset shards; image bytes are unchanged.

Samples are ordered by the first appearance of their image. All samples of an image are adjacent, and in one shard if
one shard can hold them. A text-only sample keeps its place. The same input gives the same bytes.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from pipeline.data.decoding import MAX_IMAGE_PIXELS
from pipeline.data.file_names import expand_home
from pipeline.errors import PackError
from pipeline.packing.again import replacing, settle
from pipeline.packing.annotations import BadRecord, Record, read_annotations
from pipeline.packing.folder import (
    Pack,
    PackSummary,
    begin_pack,
    finish_pack,
    finished_pack,
    refuse_rejects,
    was_interrupted,
)
from pipeline.packing.images import UNREADABLE, ImageFile, read_images, state_of
from pipeline.packing.shard_writer import ShardWriter


def pack(
    annotations: Path,
    output: Path,
    *,
    image_folder: Path,
    samples_per_shard: int = 1000,
    on_bad_sample: Literal["reject", "fail"] = "reject",
    max_pixels: int = MAX_IMAGE_PIXELS,
    again: bool = False,
    allow_fewer: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> PackSummary:
    """Write `shard-000000.tar`, ..., `rejects.jsonl` and, last, `pack.json` into `output`.

    A finished pack of the same input stays; rejected entries whose images were repaired are added in new shards. An
    unfinished pack is started anew. `again` packs everything again and replaces the finished pack, even one of other
    input; if it would hold fewer samples, only with `allow_fewer`. `progress` gets how many of the entries to pack
    are done, and how many there are. Raises `PackError` for input that cannot be packed and, with "fail", after
    listing bad entries.
    """
    annotations, output, image_folder = map(expand_home, (annotations, output, image_folder))
    asked = _asked(annotations, image_folder, samples_per_shard, on_bad_sample, max_pixels)
    if settle(output):
        say(f"{output}: the pack that an interrupted --again had finished is in place now")
    with replacing(output, again=again, allow_fewer=allow_fewer) as place:
        found = None if again else finished_pack(output, asked)
        lines = _repaired_lines(found.rejects, image_folder) if found else set()
        if found and not lines and not was_interrupted(output):
            nothing = "nothing was done; --again packs everything again"
            say(f"{output} holds a finished pack of this input: {nothing}")
            return found.summary
        if found:
            noun, verb = ("entry", "is") if len(lines) == 1 else ("entries", "are")
            retried = f"{len(lines)} rejected {noun} whose images changed {verb} tried again"
            say(f"{retried}; what is packed stays as it is")
        contents = found or Pack()
        begin_pack(place, asked, keep=contents.shards)
        entries = list(read_annotations(annotations, image_folder))
        records = [e for e in entries if isinstance(e, Record) and (not found or e.line in lines)]
        tried = {record.line for record in records}
        rejects = found.rejects if found else [e for e in entries if isinstance(e, BadRecord)]
        contents.rejects = [bad for bad in rejects if bad.line not in tried]
        _fill(place, contents, records, image_folder, asked, progress)
        return finish_pack(place, asked, contents)


def _repaired_lines(rejects: Iterable[BadRecord], image_folder: Path) -> set[int]:
    """Return the lines of the rejected entries with an image that is there now and has changed."""
    return {
        bad.line
        for bad in rejects
        if any(state_of(image, image_folder) not in (None, state) for image, state in bad.images.items())
    }


def _fill(
    place: Path,
    contents: Pack,
    records: list[Record],
    image_folder: Path,
    asked: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    """Write records into new shards; add the shards, the images and the bad records to `contents`."""
    writer = ShardWriter(place, samples_per_shard=asked["samples_per_shard"], shards=contents.shards)
    fail = asked["on_bad_sample"] == "fail"
    if fail:
        refuse_rejects(place, contents.rejects)
    num_done = 0
    with closing(writer):
        for group in _group_by_image(records):
            writer.write(_samples(group, contents, image_folder, max_pixels=asked["max_pixels"]))
            if fail:
                refuse_rejects(place, contents.rejects)
            num_done += len(group)
            progress(num_done, len(records))
        writer.finish()


def _group_by_image(records: list[Record]) -> list[list[Record]]:
    """Return the records of each first image, by first appearance; a text-only record is a group of its own."""
    groups: dict[str | int, list[Record]] = {}
    for record in records:
        groups.setdefault(record.images[0] if record.images else record.line, []).append(record)
    return list(groups.values())


def _samples(
    group: list[Record], contents: Pack, image_folder: Path, *, max_pixels: int
) -> list[tuple[str, dict[str, bytes]]]:
    """Return key and members of each good record; reads an image once a group."""
    images, errors = read_images((i for record in group for i in record.images), image_folder, max_pixels)
    samples = []
    for record in group:
        if bad := {image: errors[image] for image in record.images if image in errors}:
            # Size and time do not show who may read a file: without a state, it is tried on every run.
            states = {
                image: None if error.kind == UNREADABLE else state_of(image, image_folder)
                for image, error in bad.items()
            }
            first = next(iter(bad.values()))
            contents.rejects.append(BadRecord(record.id, record.line, first.kind, first.detail, states))
            continue
        files = {image: images[image] for image in record.images}
        contents.images |= {image: (file.state, file.digest) for image, file in files.items()}
        members = _members(record, [images[image] for image in record.images])
        samples.append((key_of_id(record.id, record.repeat), members))
    return samples


def _members(record: Record, images: list[ImageFile]) -> dict[str, bytes]:
    """Return ending -> bytes: "json", then "jpg" for one image, or "0.jpg", "1.png", ... for several."""
    number = "" if len(images) == 1 else "{}."
    named = {f"{number.format(n)}{image.ending}": image.data for n, image in enumerate(images)}
    return {"json": record.json, **named}


def key_of_id(identity: str, repeat: int = 1) -> str:
    """Return an id as a WebDataset key: percent-encoded, without the "/" and "." that would split it.

    The second entry with an id gets the suffix "+2", and so on; in an id itself "+" is encoded.
    """
    key = urllib.parse.quote(identity, safe="").replace(".", "%2E")
    return key if repeat == 1 else f"{key}+{repeat}"


def _asked(
    annotations: Path, image_folder: Path, samples_per_shard: int, policy: str, max_pixels: int
) -> dict[str, Any]:
    """Return what identifies a pack's input; raises `PackError` for what cannot be packed."""
    if not annotations.is_file():
        raise PackError(f"No annotations at {annotations}; name a LLaVA JSON or JSONL file.")
    if not image_folder.is_dir():
        raise PackError(f"No image folder at {image_folder}; name the folder that image paths start from.")
    if samples_per_shard < 1:
        raise PackError(f"samples_per_shard must be at least 1, found {samples_per_shard}; 1000 is usual.")
    if policy not in ("reject", "fail"):
        raise PackError(f"on_bad_sample: unknown value {policy!r}; known are reject, fail.")
    return {
        "annotations": blake3().update_mmap(annotations).hexdigest(),
        "image_folder": str(image_folder.resolve()),
        "samples_per_shard": samples_per_shard,
        "on_bad_sample": policy,
        "max_pixels": max_pixels,
    }
