"""WebDataset tars to samples, each with the place of its bytes in the tar.

A sample is a run of members with one key: KEY.json, and KEY.jpg for one image, or KEY.0.jpg, KEY.1.jpg, ...
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3
from braceexpand import braceexpand

from cache import Span
from pipeline.data.decoding import ENDINGS, MAX_IMAGE_PIXELS, read_header
from pipeline.data.dialogues import read_dialogue
from pipeline.data.file_names import as_stored, expand_home, longest_stored
from pipeline.data.tars import Group, open_tar, read_groups, read_member, reading
from pipeline.data.templates import Turn
from pipeline.errors import BadSample, ShardError


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


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the tar files that folders, globs and brace patterns name, sorted.

    Raises `ShardError` if a pattern names nothing, a brace pattern names a missing file, or two shards have one name.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ShardError("No shards are named; name a folder, a glob, or shard-{000000..000009}.tar.")
    paths = sorted({path for pattern in patterns for path in _expand(str(pattern))})
    by_stem: dict[str, str] = {}
    for path in paths:
        first = by_stem.setdefault(Path(path).stem, path)
        if first != path:
            raise ShardError(
                f"Two shards have one name, {Path(path).stem}: {first} and {path}; rename one, "
                "for a shard's name is its part's name in the store."
            )
    return paths


def part_name(shard: str) -> str:
    """Return the name of a shard's part in the store."""
    return Path(shard).name.removesuffix(".tar")


def read_shard(path: str | Path, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Sample | Rejected]:
    """Yield every sample of a shard in order, unusable ones as `Rejected`; one sample is in memory at a time.

    Raises `ShardError` if the tar is compressed, truncated or damaged, at the latest after the last sample: the
    samples yielded until then are not a whole shard.
    """
    seen: set[str] = set()
    with open_tar(path) as tar:
        for group in read_groups(tar, path):
            if group.key in seen:
                group.problem = BadSample(
                    "key occurs twice in this shard", "its members must be side by side"
                )
            seen.add(group.key)
            try:
                yield _sample(group, tar, max_pixels=max_pixels)
            except BadSample as error:
                yield Rejected(group.key, error.reason)


def read_span(path: str | Path, span: Span) -> bytes:
    """Return a member's bytes by their place in the tar; raises `ShardError` if the shard is shorter."""
    with reading(path), open(path, "rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if len(data) != span.size:
        raise ShardError(
            f"{path}: {span.file} should be {span.size} bytes at {span.offset}, found {len(data)}; "
            "the shard has changed since it was read: restore it."
        )
    return data


def _expand(pattern: str) -> list[str]:
    """Return the files that a pattern names. A path that exists is not a pattern, nor are the folders before one."""
    if "://" in pattern:
        raise ShardError(f"{pattern}: shards are read from local files only; copy them or mount the store.")
    path = as_stored(expand_home(pattern))
    if path.is_dir():
        # macOS leaves a ._shard.tar beside each shard on foreign disks.
        found = [str(file) for file in path.glob("*.tar") if not file.name.startswith(".")]
        return found or _refuse(pattern, path)
    if path.is_file():
        return [str(path)]
    folder = longest_stored(path)
    try:
        names = list(braceexpand(str(Path(*path.parts[len(folder.parts) :]))))
    except ValueError as error:  # unbalanced braces
        raise ShardError(f"{pattern}: {error}; write ranges as {{000000..000009}}.") from error
    paths: list[str] = []
    missing: list[Path] = []
    for name in names:
        file = as_stored(folder / name)
        if file.is_file():
            paths.append(str(file))
        elif glob.has_magic(name):
            paths += _glob(str(Path(glob.escape(str(folder))) / name)) or _refuse(str(file), file.parent)
        else:
            missing.append(file)
    if missing and len(names) == 1:
        _refuse(pattern, path.parent)
    if missing:
        raise ShardError(
            f"{pattern} names {len(names)} shards, {len(missing)} of them missing, first {missing[0]}; "
            "correct the range or restore the files."
        )
    return paths


def _glob(pattern: str) -> list[str]:
    """Return the paths that a glob names; raises `ShardError` for a folder on the way that cannot be listed."""
    folders = os.path.dirname(pattern)
    while glob.has_magic(folders):
        for folder in glob.glob(f"{folders}/", recursive=True):
            with reading(folder), os.scandir(folder):
                pass
        folders = os.path.dirname(folders)
    return glob.glob(pattern, recursive=True)


def _refuse(pattern: str, folder: Path) -> NoReturn:
    if not folder.is_dir():
        raise ShardError(f"No shard at {pattern}: there is no folder {folder}; correct the path.")
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise ShardError(
        f"No shard at {pattern}: {folder} holds {found or 'nothing'}; correct the path, or make shards with "
        "`alignkd pack`."
    )


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
