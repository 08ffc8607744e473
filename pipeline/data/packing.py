"""LLaVA annotations and an image folder to WebDataset shards; image bytes are unchanged.

Samples are ordered by the first appearance of their image. All samples of an image are adjacent, and in one shard if
one shard can hold them. A text-only sample keeps its place. The same input gives the same bytes.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from pipeline.data.annotations import Record, read_annotations
from pipeline.data.decoding import MAX_IMAGE_PIXELS
from pipeline.data.file_names import expand_home
from pipeline.data.pack_again import replacing, settle
from pipeline.data.pack_folder import (
    IMAGES,
    REJECTS,
    FinishedPack,
    PackSummary,
    Rejects,
    begin_pack,
    continue_pack,
    finish_pack,
    finished_pack,
    was_interrupted,
)
from pipeline.data.pack_images import ImageFile, read_image_file, recording, state_of
from pipeline.data.shard_writer import ShardWriter
from pipeline.errors import BadSample, PackError


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
    input; if it would hold fewer samples, only with `allow_fewer`. `progress` gets the number of entries done and
    their total. Raises `PackError` for input that cannot be packed and, with "fail", after listing bad entries.
    """
    annotations, output, image_folder = map(expand_home, (annotations, output, image_folder))
    asked = _asked(
        annotations,
        image_folder,
        samples_per_shard=samples_per_shard,
        policy=on_bad_sample,
        max_pixels=max_pixels,
    )
    if settle(output):
        say(f"{output}: the pack that an interrupted --again had finished is in place now")
    with replacing(output, again=again, allow_fewer=allow_fewer) as place:
        rejects = Rejects(place / REJECTS, fail=on_bad_sample == "fail", image_folder=image_folder)
        entries = read_annotations(annotations, image_folder)
        finished = None if again else finished_pack(output, asked)
        if finished is None:
            begin_pack(place, asked)
            records, shards = rejects.sift(entries), []
            num_done = len(rejects.found)
        else:
            lines = _repaired_lines(finished, image_folder)
            if not lines and not was_interrupted(output):
                nothing = "nothing was done; --again packs everything again"
                say(f"{output} holds a finished pack of this input: {nothing}")
                return finished.summary
            noun, verb = ("entry", "is") if len(lines) == 1 else ("entries", "are")
            say(
                f"{len(lines)} rejected {noun} whose images changed {verb} tried again; "
                "what is packed stays as it is"
            )
            continue_pack(output, asked, finished)
            records, shards, num_done = rejects.retry(finished.rejects, entries, lines), finished.shards, 0
        writer = ShardWriter(place, samples_per_shard=samples_per_shard, shards=shards)
        read_image = partial(read_image_file, folder=image_folder, max_pixels=max_pixels)
        total = num_done + len(records)
        with recording(place / IMAGES, append=bool(shards)) as record_image:
            for group in _group_by_image(records):
                writer.write(_samples(group, read_image, record_image, rejects))
                num_done += len(group)
                progress(num_done, total)
        return finish_pack(place, asked, shards=writer.finish(), rejects=rejects)


def _repaired_lines(pack: FinishedPack, image_folder: Path) -> set[int]:
    """Return the lines of the rejected entries with an image that is there now and has changed."""
    return {
        bad.line
        for bad in pack.rejects
        if any(state_of(image, image_folder) not in (None, state) for image, state in bad.images.items())
    }


def key_of_id(identity: str, repeat: int = 1) -> str:
    """Return an id as a WebDataset key: percent-encoded, without the "/" and "." that would split it.

    The second entry with an id gets the suffix "+2", and so on; in an id itself "+" is encoded.
    """
    key = urllib.parse.quote(identity, safe="").replace(".", "%2E")
    return key if repeat == 1 else f"{key}+{repeat}"


def id_of_key(key: str) -> str:
    """Return the id that `key_of_id` made a key of."""
    return urllib.parse.unquote(key.partition("+")[0])


def _group_by_image(records: list[Record]) -> list[list[Record]]:
    """Return the records of each first image, by first appearance; a text-only record is a group of its own."""
    groups: dict[str | int, list[Record]] = {}
    for record in records:
        groups.setdefault(record.images[0] if record.images else record.line, []).append(record)
    return list(groups.values())


def _samples(
    group: list[Record],
    read_image: Callable[[str], ImageFile],
    record_image: Callable[[str, ImageFile], object],
    rejects: Rejects,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of each good record, then record the images; reads an image once a group."""
    good: dict[str, ImageFile] = {}
    bad: dict[str, BadSample] = {}
    used: set[str] = set()
    for record in group:
        for image in record.images:
            if image in good or image in bad:
                continue
            try:
                good[image] = read_image(image)
            except BadSample as error:
                bad[image] = error
        if reasons := {image: bad[image] for image in record.images if image in bad}:
            rejects.add(record, reasons)
            continue
        used.update(record.images)
        yield key_of_id(record.id, record.repeat), _members(record, [good[image] for image in record.images])
    for image in sorted(used):
        record_image(image, good[image])


def _members(record: Record, images: list[ImageFile]) -> dict[str, bytes]:
    """Return ending -> bytes: "json", then "jpg" for one image, or "0.jpg", "1.png", ... for several."""
    number = "" if len(images) == 1 else "{}."
    named = {f"{number.format(n)}{image.ending}": image.data for n, image in enumerate(images)}
    return {"json": json.dumps(record.fields).encode(), **named}


def _asked(
    annotations: Path, image_folder: Path, *, samples_per_shard: int, policy: str, max_pixels: int
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
