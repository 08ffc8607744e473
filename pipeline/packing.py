"""LLaVA annotations and an image folder to WebDataset shards, image bytes untouched.

Samples stand in the order of their image's first appearance, all samples of an image side by side and, where
one shard can hold them, in one shard; a text-only sample stays at its place. Same input, same bytes.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from pipeline.annotations import BadRecord, Record, read_annotations
from pipeline.decoding import FORMATS, MAX_IMAGE_PIXELS, check_image
from pipeline.errors import BadSample, PackError
from pipeline.file_names import as_stored, expand_home
from pipeline.pack_folder import REJECTS, PackSummary, Rejects, begin_pack, finish_pack, finished_pack
from pipeline.shard_writer import ShardWriter
from pipeline.tars import MAX_MEMBER_BYTES


def pack(
    annotations: Path,
    output: Path,
    *,
    image_folder: Path,
    samples_per_shard: int = 1000,
    on_bad_sample: Literal["reject", "fail"] = "reject",
    max_pixels: int = MAX_IMAGE_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Write `shard-000000.tar`, ..., `rejects.jsonl` and, last, `pack.json` into `output`.

    A finished pack of the same input is left as it is; an unfinished one is begun anew. `progress` gets the
    numbers of entries done and in all. With "fail" a bad entry is listed too, and then raises `PackError`.
    """
    annotations, output, image_folder = map(expand_home, (annotations, output, image_folder))
    asked = _asked(
        annotations,
        image_folder,
        samples_per_shard=samples_per_shard,
        policy=on_bad_sample,
        max_pixels=max_pixels,
    )
    if (finished := finished_pack(output, asked)) is not None:
        return finished
    begin_pack(output, asked)
    rejects = Rejects(output / REJECTS, fail=on_bad_sample == "fail")
    records = rejects.sift(read_annotations(annotations, image_folder))
    writer = ShardWriter(output, samples_per_shard=samples_per_shard)
    num_done = len(rejects.found)
    num_read = num_done + len(records)
    for group in group_by_image(records):
        writer.write(_samples(group, image_folder, rejects, max_pixels=max_pixels))
        num_done += len(group)
        if progress is not None:
            progress(num_done, num_read)
    return finish_pack(output, asked, shards=writer.finish(), rejects=rejects)


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


def _samples(
    group: list[Record], image_folder: Path, rejects: Rejects, *, max_pixels: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each good record; an image that several share is read and decoded once."""
    loaded: dict[str, tuple[str, bytes] | BadSample] = {}
    for record in group:
        try:
            members = {"json": json.dumps(record.fields).encode()}
            for number, image in enumerate(record.images):
                if image not in loaded:
                    loaded[image] = _load_or_bad(image, image_folder, max_pixels=max_pixels)
                found = loaded[image]
                if isinstance(found, BadSample):
                    raise found
                ending, data = found
                members[ending if len(record.images) == 1 else f"{number}.{ending}"] = data
        except BadSample as error:
            rejects.add(BadRecord(record.line, record.id, error))
        else:
            yield key_of_id(record.id, record.repeat), members


def _load_or_bad(image: str, image_folder: Path, *, max_pixels: int) -> tuple[str, bytes] | BadSample:
    try:
        return _load(image, image_folder, max_pixels=max_pixels)
    except BadSample as error:
        return error


def _load(image: str, image_folder: Path, *, max_pixels: int) -> tuple[str, bytes]:
    """The ending (by the content) and bytes of an image file that decodes to its end."""
    path = image_folder / image
    try:
        if not path.is_file():
            path = as_stored(path)
        if not path.is_file():
            raise BadSample("missing image file", image)
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("image file too large", f"{image}, {size} bytes; the limit is {MAX_MEMBER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise BadSample("unreadable image file", f"{image}: {error.strerror}") from error
    try:
        kind = check_image(data, max_pixels=max_pixels)
    except BadSample as error:
        raise BadSample(error.kind, f"{image}: {error.detail}") from error
    ending = path.suffix.lower().removeprefix(".")
    if FORMATS.get(ending) != kind:
        ending = next(name for name, known in FORMATS.items() if known == kind)
    return ending, data


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
        "image_folder": str(image_folder),
        "samples_per_shard": samples_per_shard,
        "on_bad_sample": policy,
        "max_pixels": max_pixels,
    }
