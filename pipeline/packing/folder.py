"""The folder of a pack: begin and finish a pack in it, and read a finished one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import PackError
from pipeline.packing.annotations import BadRecord
from pipeline.packing.images import PackedImages, is_changed, state_of
from pipeline.packing.shard_writer import NAME, PART, Shard, write_lines, write_whole
from pipeline.packing.worklist import Worklist

FINISHED = "pack.json"
UNFINISHED = "pack.unfinished.json"
REJECTS = "rejects.jsonl"
IMAGES = "pack.images.jsonl"
OWN_REJECTS = "pack.rejects.{}.jsonl"  # all that is known of the rejects, of a pack with so many shards
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
    """What a folder of shards holds: the shards, the images in them, and the file that lists what was rejected."""

    images: PackedImages
    shards: list[Shard] = field(default_factory=list)
    summary: PackSummary | None = None
    rejects_file: Path | None = None

    def rejects(self) -> Iterator[BadRecord]:
        """Yield the rejected entries of a finished pack by their lines."""
        if self.rejects_file is not None:
            with open(self.rejects_file, encoding="ascii") as file:
                yield from (BadRecord(**json.loads(line)) for line in file)


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
            PackedImages(output / IMAGES, found["images_size"]),
            [Shard(**shard) for shard in found["shards"]],
            PackSummary(**found["summary"] | {"shards": tuple(found["summary"]["shards"])}),
            _rejects_file(output, found),
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
    try:
        _check_images(output, pack.images, old_folder, Path(asked["image_folder"]))
    except (ValueError, TypeError, OSError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{output / IMAGES} cannot be read ({error}); {OR_ANOTHER}") from error
    return pack


def _rejects_file(output: Path, found: Mapping[str, Any]) -> Path:
    """Return the file of a finished pack's rejects; earlier versions had them in `pack.json` itself."""
    file = output / OWN_REJECTS.format(len(found["shards"]))
    if "rejects" in found:
        write_lines(file, (asdict(BadRecord(**row)) for row in found["rejects"]))
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    return file


def _check_images(output: Path, images: PackedImages, old_folder: Path, folder: Path) -> None:
    is_moved = old_folder.resolve() != folder
    missing: list[str] = []
    changed: list[str] = []
    for image, state, digest in images:
        if is_moved and state_of(image, folder) is None:
            missing.append(image)
        elif is_changed(image, folder, state, digest):
            changed.append(image)
    if missing:
        raise PackError(
            f"{output} holds a pack of other input: image_folder was {old_folder}, now {folder}, "
            f"where {len(missing)} of its images are missing, first {missing[0]}; {OR_ANOTHER}"
        )
    if changed:
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


def finish_pack(output: Path, asked: Mapping[str, Any], pack: Pack, work: Worklist) -> PackSummary:
    """Write the lists of rejects, then `pack.json`, with which the pack is finished."""
    own_rejects = output / OWN_REJECTS.format(len(pack.shards))
    write_lines(own_rejects, (asdict(bad) for bad in work.rejects()))
    write_rejects(output, work.rejects())
    pack.images.finish()
    num_packed = sum(shard.num_samples for shard in pack.shards)
    summary = PackSummary(
        seen=num_packed + work.num_rejects,
        packed=num_packed,
        rejected=work.num_rejects,
        shards=tuple(shard.name for shard in pack.shards),
        rejects_by_reason=work.rejects_by_reason(),
    )
    described = {
        "input": asked,
        "shards": [asdict(shard) for shard in pack.shards],
        "summary": asdict(summary),
        "images_size": pack.images.size,
    }
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    for left in output.glob(OWN_REJECTS.format("*")):
        if left != own_rejects:
            left.unlink()
    (output / UNFINISHED).unlink()
    return summary


def shards_in(output: Path) -> list[Path]:
    """Return the shards in a folder, finished and unfinished."""
    return [path for path in output.iterdir() if NAME.fullmatch(path.name.removesuffix(PART))]


def write_rejects(output: Path, rejects: Iterable[BadRecord]) -> None:
    """List the rejected entries in `rejects.jsonl`."""
    write_lines(output / REJECTS, ({"id": bad.id, "line": bad.line, "reason": bad.reason} for bad in rejects))


def refuse_rejects(output: Path, work: Worklist) -> None:
    """List the rejected entries, if any, and raise `PackError`."""
    if number := work.num_rejects:
        write_rejects(output, work.rejects())
        first = next(work.rejects())
        raise PackError(
            f"{number} bad sample(s), first entry {first.line} (id {first.id}): {first.reason}; "
            f"correct what {output / REJECTS} lists, or set on_bad_sample to reject."
        )
