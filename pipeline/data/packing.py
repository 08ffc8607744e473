"""LLaVA annotations and an image folder to WebDataset shards, image bytes untouched.

Samples stand in the order of their image's first appearance, all samples of an image side by side and, where
one shard can hold them, in one shard; a text-only sample stays at its place. Same input, same bytes.
"""

from __future__ import annotations

import errno
import json
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from pipeline.data.annotations import BadRecord, Record, read_annotations
from pipeline.data.decoding import FORMATS, MAX_IMAGE_PIXELS, check_image
from pipeline.data.file_names import as_stored, expand_home
from pipeline.data.pack_again import replacing, settle
from pipeline.data.pack_folder import (
    IMAGES,
    REJECTS,
    UNREADABLE,
    FinishedPack,
    PackSummary,
    Rejects,
    begin_pack,
    check_finished,
    continue_pack,
    finish_pack,
    finished_pack,
    was_interrupted,
)
from pipeline.data.pack_images import PackedImages, State, state_of
from pipeline.data.shard_writer import ShardWriter
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import BadSample, PackError

# What is wrong with one image file. A disk that fails or a process out of files ends the run: it is not the image.
ONE_FILES_TROUBLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT}


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
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PackSummary:
    """Write `shard-000000.tar`, ..., `rejects.jsonl` and, last, `pack.json` into `output`.

    A finished pack of the same input is left as it is, but for rejected entries whose images were repaired: they
    come into further shards. `again` packs everything again and then replaces the pack, one of other input too,
    unless it would hold fewer samples: these only with `allow_fewer`. An unfinished pack is begun anew.
    `progress` gets the numbers of entries done and in all; of a finished pack, those that are tried again. With
    "fail" a bad entry is listed too, and then raises `PackError`.
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
        finished = None if again else finished_pack(output, asked)
        if finished is None:
            begin_pack(place, asked)
            records, shards = rejects.sift(read_annotations(annotations, image_folder)), []
            num_done = len(rejects.found)
        else:
            lines = _lines_to_try(finished, output, image_folder, say)
            if lines is None:
                return finished.summary
            continue_pack(output, asked, finished)
            records, shards = _records_of(lines, read_annotations(annotations, image_folder)), finished.shards
            tried = {record.line for record in records}
            rejects.found = [reject for reject in finished.rejects if reject.bad.line not in tried]
            num_done = 0
        writer = ShardWriter(place, samples_per_shard=samples_per_shard, shards=shards)
        packed = PackedImages(place / IMAGES, empty=not shards)
        num_read = num_done + len(records)
        for group in group_by_image(records):
            writer.write(_samples(group, image_folder, rejects, packed, max_pixels=max_pixels))
            num_done += len(group)
            if progress is not None:
                progress(num_done, num_read)
        packed.close()
        return finish_pack(place, asked, shards=writer.finish(), rejects=rejects)


def _lines_to_try(
    finished: FinishedPack, output: Path, image_folder: Path, say: Callable[[str], None]
) -> set[int] | None:
    """The entries of a finished pack that are worth trying again, or None if there is nothing to do."""
    check_finished(output, finished, image_folder=image_folder)
    lines = {reject.bad.line for reject in finished.rejects if reject.was_repaired(image_folder)}
    if not lines and not was_interrupted(output):
        say(f"{output} holds a finished pack of this input: nothing was done; --again packs everything again")
        return None
    say(f"{_tried(len(lines))} tried again; what is packed stays as it is")
    return lines


def _tried(number: int) -> str:
    entries, are = ("entry", "is") if number == 1 else ("entries", "are")
    return f"{number} rejected {entries} whose images changed {are}"


def _records_of(lines: set[int], entries: Iterator[Record | BadRecord]) -> list[Record]:
    return [entry for entry in entries if isinstance(entry, Record) and entry.line in lines]


def key_of_id(identity: str, repeat: int = 1) -> str:
    """An id as a WebDataset key: percent-encoded, without the "/" and "." that would split it.

    The second entry with an id gets "+2" behind it, and so on; no id can end so, for its "+" would be encoded.
    """
    key = urllib.parse.quote(identity, safe="").replace(".", "%2E")
    return key if repeat == 1 else f"{key}+{repeat}"


def id_of_key(key: str) -> str:
    """The id that `key_of_id` made a key of."""
    return urllib.parse.unquote(key.partition("+")[0])


def group_by_image(records: list[Record]) -> list[list[Record]]:
    """Records of one (first) image together, by first appearance; a text-only record is alone."""
    groups: dict[str | int, list[Record]] = {}
    for record in records:
        groups.setdefault(record.images[0] if record.images else record.line, []).append(record)
    return list(groups.values())


# Samples of a group


@dataclass(frozen=True)
class _Image:
    """An image file that decodes to its end: its ending by the content, its bytes, its state before reading."""

    ending: str
    data: bytes
    state: State


def _samples(
    group: list[Record], image_folder: Path, rejects: Rejects, packed: PackedImages, *, max_pixels: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each good record; an image that several share is read and decoded once."""
    loaded: dict[str, _Image | BadSample] = {}
    logged: set[str] = set()
    for record in group:
        for image in record.images:
            if image not in loaded:
                loaded[image] = _load_or_bad(image, image_folder, max_pixels=max_pixels)
        found = [(name, loaded[name]) for name in record.images]
        if bad := {name: image for name, image in found if isinstance(image, BadSample)}:
            rejects.add(record, bad)
            continue
        images = [image for _, image in found if isinstance(image, _Image)]
        for name, image in zip(record.images, images, strict=True):
            if name not in logged:
                packed.add(name, image.state, blake3(image.data).hexdigest())
                logged.add(name)
        yield key_of_id(record.id, record.repeat), _members(record, images)


def _members(record: Record, images: list[_Image]) -> dict[str, bytes]:
    named = {f"{number}.{image.ending}": image.data for number, image in enumerate(images)}
    if len(images) == 1:
        named = {images[0].ending: images[0].data}
    return {"json": json.dumps(record.fields).encode(), **named}


def _load_or_bad(image: str, image_folder: Path, *, max_pixels: int) -> _Image | BadSample:
    try:
        return _load(image, image_folder, max_pixels=max_pixels)
    except BadSample as error:
        return error


def _load(image: str, image_folder: Path, *, max_pixels: int) -> _Image:
    try:
        path = as_stored(image_folder / image)
        if not path.is_file():
            raise BadSample("missing image file", image)
        state = state_of(image, image_folder)
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("image file too large", f"{image}, {size} bytes; the limit is {MAX_MEMBER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        if error.errno not in ONE_FILES_TROUBLE:
            raise
        raise BadSample(UNREADABLE, f"{image}: {error.strerror}") from error
    try:
        kind = check_image(data, max_pixels=max_pixels)
    except BadSample as error:
        raise BadSample(error.kind, f"{image}: {error.detail}") from error
    ending = path.suffix.lower().removeprefix(".")
    if FORMATS.get(ending) != kind:
        ending = next(name for name, known in FORMATS.items() if known == kind)
    return _Image(ending, data, state)


def _asked(
    annotations: Path, image_folder: Path, *, samples_per_shard: int, policy: str, max_pixels: int
) -> dict[str, Any]:
    """What a pack is made of, to tell whether a finished one is the one that is asked for."""
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
