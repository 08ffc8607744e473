"""The folder of a pack: is it finished, of which input, and what was rejected; begins, continues and finishes it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.annotations import BadRecord, Record
from pipeline.data.pack_images import UNREADABLE, changed_images, missing_images, state_of
from pipeline.data.shard_writer import NAME, PART, Shard, write_whole
from pipeline.errors import BadSample, PackError

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


@dataclass(frozen=True)
class FinishedPack:
    """A finished pack of the input that is asked for.

    Only the first `images_size` bytes of the record of images are valid; None, in old packs, means all.
    """

    summary: PackSummary
    shards: list[Shard]
    rejects: list[BadRecord]
    images_size: int | None


def finished_pack(output: Path, asked: Mapping[str, Any]) -> FinishedPack | None:
    """Return the finished pack of the input `asked`, or None if there is no finished pack.

    Raises `PackError` if the pack is of other input, a shard is missing, or a packed image has changed since.
    """
    file = output / FINISHED
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
        shards = [Shard(**shard) for shard in found["shards"]]
        summary = PackSummary(**{**found["summary"], "shards": tuple(shard.name for shard in shards)})
        rejects = [_bad_record(**row) for row in found.get("rejects", [])]
        packed, images_size = dict(found["input"]), found.get("images_size")
        old_folder = str(packed.pop("image_folder"))
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{file} cannot be read ({error}); {OR_ANOTHER}") from error
    for name, value in asked.items():
        if name != "image_folder" and packed.get(name) != value:
            raise PackError(
                f"{output} holds a pack of other input: {name} was {packed.get(name)}, now {value}; {OR_ANOTHER}"
            )
    _check_shards(output, shards)
    _check_images(output / IMAGES, Path(old_folder), Path(asked["image_folder"]), images_size)
    return FinishedPack(summary, shards, rejects, images_size)


def _bad_record(*, kind: str, detail: str, **fields: Any) -> BadRecord:
    return BadRecord(error=BadSample(kind, detail), **fields)


def _check_shards(output: Path, shards: Iterable[Shard]) -> None:
    for shard in shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise PackError(
                f"{path} is missing or not {shard.size_bytes} bytes, as {FINISHED} says; "
                f"restore it, or pack everything again with --again."
            )


def _check_images(record: Path, old_folder: Path, folder: Path, size: int | None) -> None:
    if old_folder.resolve() != folder:
        missing = missing_images(record, folder, size=size)
        if missing or not record.is_file():
            where = f"where {len(missing)} of its images are missing, first {missing[0]}" if missing else ""
            raise PackError(
                f"{record.parent} holds a pack of other input: image_folder was {old_folder}, now {folder}, "
                f"{where or 'and the pack has no record of its images to compare'}; {OR_ANOTHER}"
            )
    if changed := changed_images(record, folder, size=size):
        raise PackError(
            f"{len(changed)} image(s) changed after they were packed, first {changed[0]}; {record.parent} holds "
            "the old ones, and nothing was done: restore them, or pack everything again with --again."
        )


def begin_pack(output: Path, asked: Mapping[str, Any]) -> None:
    """Make an empty place for shards: remove what an earlier pack left, and raise `PackError` for other shards."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; name a folder for the shards.")
    output.mkdir(parents=True, exist_ok=True)
    left = shards_in(output)
    if left and not was_interrupted(output) and not (output / FINISHED).is_file():
        raise PackError(
            f"{output} already holds {left[0].name}, which is of no pack known here; name an empty folder."
        )
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")
    (output / FINISHED).unlink(missing_ok=True)
    for path in left:
        path.unlink()


def was_interrupted(output: Path) -> bool:
    """Return whether a run that packed into the folder did not finish."""
    return (output / UNFINISHED).is_file()


def continue_pack(output: Path, asked: Mapping[str, Any], pack: FinishedPack) -> None:
    """Prepare to add shards to a finished pack: remove what an interrupted run added."""
    if was_interrupted(output):
        images = output / IMAGES
        if pack.images_size is not None and images.is_file() and images.stat().st_size > pack.images_size:
            os.truncate(images, pack.images_size)
        for path in set(shards_in(output)) - {output / shard.name for shard in pack.shards}:
            path.unlink()
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")


def finish_pack(
    output: Path, asked: Mapping[str, Any], *, shards: list[Shard], rejects: Rejects
) -> PackSummary:
    """Write the rejects, then `pack.json`, with which the pack is finished."""
    num_packed = sum(shard.num_samples for shard in shards)
    found = rejects.in_order()
    summary = PackSummary(
        seen=num_packed + len(found),
        packed=num_packed,
        rejected=len(found),
        shards=tuple(shard.name for shard in shards),
        rejects_by_reason=dict(Counter(bad.error.kind for bad in found).most_common()),
    )
    described = {
        "input": asked,
        "shards": [asdict(shard) for shard in shards],
        "summary": asdict(summary),
        "rejects": [
            {"id": b.id, "line": b.line, "kind": b.error.kind, "detail": b.error.detail, "images": b.images}
            for b in found
        ],
        "images_size": (output / IMAGES).stat().st_size,
    }
    rejects.write()
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    (output / UNFINISHED).unlink()
    return summary


def shards_in(output: Path) -> list[Path]:
    """Return the shards in a folder, finished and unfinished, by their names."""
    return [path for path in output.iterdir() if NAME.fullmatch(path.name.removesuffix(PART))]


class Rejects:
    """The bad records of a pack. With `fail`, a bad record is listed in `path` and raises `PackError`."""

    def __init__(self, path: Path, *, fail: bool, image_folder: Path) -> None:
        self.path = path
        self.fail = fail
        self.image_folder = image_folder
        self.found: list[BadRecord] = []

    def sift(self, entries: Iterable[Record | BadRecord]) -> list[Record]:
        """Keep the bad records and return the good ones; with `fail`, list all bad ones before raising."""
        records: list[Record] = []
        for entry in entries:
            if isinstance(entry, Record):
                records.append(entry)
            else:
                self.found.append(entry)
        self._raise_if_asked()
        return records

    def retry(
        self, rejects: Iterable[BadRecord], entries: Iterable[Record | BadRecord], lines: set[int]
    ) -> list[Record]:
        """Return the good records in these lines of a finished pack; keep its other rejects."""
        records = [entry for entry in entries if isinstance(entry, Record) and entry.line in lines]
        tried = {record.line for record in records}
        self.found = [bad for bad in rejects if bad.line not in tried]
        return records

    def add(self, record: Record, images: Mapping[str, BadSample]) -> None:
        """Add a record of which these images cannot be packed; the first one is its reason."""
        # Size and time do not show who may read a file: without a state, an unreadable one is tried on every run.
        states = {
            image: None if error.kind == UNREADABLE else state_of(image, self.image_folder)
            for image, error in images.items()
        }
        self.found.append(BadRecord(record.line, record.id, next(iter(images.values())), states))
        self._raise_if_asked()

    def in_order(self) -> list[BadRecord]:
        """Return the bad records by their lines in the annotations."""
        return sorted(self.found, key=lambda bad: bad.line)

    def write(self) -> None:
        rows = ({"id": bad.id, "line": bad.line, "reason": bad.error.reason} for bad in self.in_order())
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _raise_if_asked(self) -> None:
        if self.fail and self.found:
            self.write()
            first = self.found[0]
            raise PackError(
                f"{len(self.found)} bad sample(s), first entry {first.line} (id {first.id}): "
                f"{first.error.reason}; correct what {self.path} lists, or set on_bad_sample to reject."
            )
