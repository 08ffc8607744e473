"""The folder of a pack: begin and finish a pack in it, and read a finished one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PackError
from pipeline.packing.annotations import BadRecord
from pipeline.packing.images import (
    PackedImages,
    changed_images,
    packed_images_text,
    read_packed_images,
    state_of,
)
from pipeline.packing.shard_writer import NAME, PART, Shard, write_whole

FINISHED = "pack.json"
UNFINISHED = "pack.unfinished.json"
REJECTS = "rejects.jsonl"
IMAGES = "pack.images.jsonl"
OR_ANOTHER = "name another output, or replace this pack with --again."


@dataclass(frozen=True)
class PackSummary:
    """What a pack holds; seen = packed + rejected."""

    seen: int
    packed: int
    rejected: int
    shards: tuple[str, ...]
    rejects_by_reason: dict[str, int]


@dataclass
class Pack:
    """What a folder of shards holds: the shards, the rejected entries, and the images in the shards."""

    shards: list[Shard] = field(default_factory=list)
    rejects: list[BadRecord] = field(default_factory=list)
    images: PackedImages = field(default_factory=dict)

    @property
    def summary(self) -> PackSummary:
        num_packed = sum(shard.num_samples for shard in self.shards)
        return PackSummary(
            seen=num_packed + len(self.rejects),
            packed=num_packed,
            rejected=len(self.rejects),
            shards=tuple(shard.name for shard in self.shards),
            rejects_by_reason=dict(Counter(bad.kind for bad in self.rejects).most_common()),
        )


def finished_pack(output: Path, asked: Mapping[str, Any]) -> Pack | None:
    """Return the finished pack of the input `asked`, or None if there is no finished pack.

    Raises `PackError` if the pack is of other input, a shard is missing, or a packed image has changed since.
    """
    file = output / FINISHED
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
        packed = dict(found["input"])
        pack = Pack(
            shards=[Shard(**shard) for shard in found["shards"]],
            rejects=[BadRecord(**row) for row in found["rejects"]],
            images=read_packed_images(output / IMAGES, found["images_size"]),
        )
        old_folder = Path(packed["image_folder"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PackError(f"{file} cannot be read ({error}); {OR_ANOTHER}") from error
    for name, value in asked.items():
        if name != "image_folder" and packed.get(name) != value:
            raise PackError(
                f"{output} holds a pack of other input: {name} was {packed.get(name)}, now {value}; {OR_ANOTHER}"
            )
    for shard in pack.shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise PackError(
                f"{path} is missing or not {shard.size_bytes} bytes, as {FINISHED} says; "
                f"restore it, or pack everything again with --again."
            )
    _check_images(output, pack.images, old_folder, Path(asked["image_folder"]))
    return pack


def _check_images(output: Path, images: PackedImages, old_folder: Path, folder: Path) -> None:
    is_moved = old_folder.resolve() != folder
    if is_moved and (missing := [image for image in images if state_of(image, folder) is None]):
        raise PackError(
            f"{output} holds a pack of other input: image_folder was {old_folder}, now {folder}, "
            f"where {len(missing)} of its images are missing, first {missing[0]}; {OR_ANOTHER}"
        )
    if changed := changed_images(images, folder):
        raise PackError(
            f"{len(changed)} image(s) changed after they were packed, first {changed[0]}; {output} holds "
            "the old ones, and nothing was done: restore them, or pack everything again with --again."
        )


def was_interrupted(output: Path) -> bool:
    """Return whether a run that packed into the folder did not finish."""
    return (output / UNFINISHED).is_file()


def begin_pack(output: Path, asked: Mapping[str, Any], *, keep: Sequence[Shard]) -> None:
    """Prepare a folder for new shards: remove what an interrupted run left beside the shards to keep.

    Raises `PackError` if the output is a file, or for shards that no run of this command left.
    """
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; name a folder for the shards.")
    output.mkdir(parents=True, exist_ok=True)
    left = sorted(set(shards_in(output)) - {output / shard.name for shard in keep})
    if left and not was_interrupted(output):
        raise PackError(
            f"{output} already holds {left[0].name}, which is of no pack known here; name an empty folder."
        )
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")
    for path in left:
        path.unlink()


def finish_pack(output: Path, asked: Mapping[str, Any], pack: Pack) -> PackSummary:
    """Write the lists of rejects and of images, then `pack.json`, with which the pack is finished."""
    pack.rejects.sort(key=lambda bad: bad.line)
    write_rejects(output, pack.rejects)
    write_whole(output / IMAGES, packed_images_text(pack.images))
    described = {
        "input": asked,
        "shards": [asdict(shard) for shard in pack.shards],
        "summary": asdict(pack.summary),
        "rejects": [asdict(bad) for bad in pack.rejects],
        "images_size": (output / IMAGES).stat().st_size,
    }
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    (output / UNFINISHED).unlink()
    return pack.summary


def shards_in(output: Path) -> list[Path]:
    """Return the shards in a folder, finished and unfinished."""
    return [path for path in output.iterdir() if NAME.fullmatch(path.name.removesuffix(PART))]


def write_rejects(output: Path, rejects: Iterable[BadRecord]) -> None:
    """List the rejected entries in `rejects.jsonl`."""
    rows = ({"id": bad.id, "line": bad.line, "reason": bad.reason} for bad in rejects)
    write_whole(output / REJECTS, "".join(json.dumps(row) + "\n" for row in rows))


def refuse_rejects(output: Path, rejects: Sequence[BadRecord]) -> None:
    """List the rejected entries, if any, and raise `PackError`."""
    if rejects:
        write_rejects(output, rejects)
        first = rejects[0]
        raise PackError(
            f"{len(rejects)} bad sample(s), first entry {first.line} (id {first.id}): {first.reason}; "
            f"correct what {output / REJECTS} lists, or set on_bad_sample to reject."
        )
