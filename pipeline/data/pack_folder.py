"""The folder of a pack: finished (of which input), unfinished or not ours; its rejects, its summary."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.annotations import BadRecord, Record
from pipeline.data.pack_images import State, changed_images, missing_images, state_of
from pipeline.data.shard_writer import NAME, PART, Shard, write_whole
from pipeline.errors import BadSample, PackError

FINISHED = "pack.json"
UNFINISHED = "pack.unfinished.json"
REJECTS = "rejects.jsonl"
IMAGES = "pack.images.jsonl"
UNREADABLE = "unreadable image file"
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
class Reject:
    """A bad entry, and the bad ones of its images in the state that they had; none if they were not why."""

    bad: BadRecord
    images: dict[str, State]

    def was_repaired(self, image_folder: Path) -> bool:
        """Whether one of the images is there now, and not as it was."""
        return any(state_of(image, image_folder) not in (None, state) for image, state in self.images.items())


@dataclass(frozen=True)
class FinishedPack:
    """A finished pack of the input that is asked for, but for the image folder, which may have moved.

    Of the file of its images the first `images_size` bytes count; None in packs of before that was recorded.
    """

    summary: PackSummary
    shards: list[Shard]
    rejects: list[Reject]
    image_folder: str
    images_size: int | None


def finished_pack(output: Path, asked: dict[str, Any]) -> FinishedPack | None:
    """The finished pack of the same input, or None.

    Raises `PackError` if the pack is of other input, or no longer whole.
    """
    file = output / FINISHED
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_bytes())
        shards = [Shard(**shard) for shard in described["shards"]]
        summary = PackSummary(**{**described["summary"], "shards": tuple(shard.name for shard in shards)})
        rejects = [_reject(**row) for row in described.get("rejects", [])]
        found = dict(described["input"])
        image_folder, images_size = str(found["image_folder"]), described.get("images_size")
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{file} cannot be read ({error}); {OR_ANOTHER}") from error
    for name, value in asked.items():
        if name != "image_folder" and found.get(name) != value:
            raise PackError(
                f"{output} holds a pack of other input: {name} was {found.get(name)}, now {value}; {OR_ANOTHER}"
            )
    return FinishedPack(summary, shards, rejects, image_folder, images_size)


def check_finished(output: Path, pack: FinishedPack, *, image_folder: Path) -> None:
    """Raise `PackError` if a shard is gone, or holds images that have changed since, or are not in a new folder."""
    for shard in pack.shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise PackError(
                f"{path} is missing or not {shard.size_bytes} bytes, as {FINISHED} says; "
                f"restore it, or pack everything again with --again."
            )
    if Path(pack.image_folder).resolve() != image_folder.resolve():
        _check_moved(output, pack, image_folder)
    if changed := changed_images(output / IMAGES, image_folder, size=pack.images_size):
        raise PackError(
            f"{len(changed)} image(s) changed after they were packed, first {changed[0]}; {output} holds what they "
            "were, and nothing was done: restore them, or pack everything again with --again."
        )


def _check_moved(output: Path, pack: FinishedPack, image_folder: Path) -> None:
    """Raise `PackError` unless a folder of another name holds every image that was packed."""
    missing = missing_images(output / IMAGES, image_folder, size=pack.images_size)
    if missing or not (output / IMAGES).is_file():
        what = f"where {len(missing)} of its images are missing, first {missing[0]}" if missing else "unseen"
        raise PackError(
            f"{output} holds a pack of other input: image_folder was {pack.image_folder}, now {image_folder}, "
            f"{what}; {OR_ANOTHER}"
        )


def begin_pack(output: Path, asked: dict[str, Any]) -> None:
    """An empty place for shards; what a pack of ours left is removed, what others left is not."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; name a folder for the shards.")
    output.mkdir(parents=True, exist_ok=True)
    left = shards_in(output)
    if left and not (output / UNFINISHED).is_file() and not (output / FINISHED).is_file():
        raise PackError(
            f"{output} already holds {left[0].name}, which is of no pack known here; name an empty folder."
        )
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")
    (output / FINISHED).unlink(missing_ok=True)
    for path in left:
        path.unlink()


def was_interrupted(output: Path) -> bool:
    """Whether a run that added to a finished pack did not come to its end."""
    return (output / UNFINISHED).is_file()


def continue_pack(output: Path, asked: dict[str, Any], pack: FinishedPack) -> None:
    """Make ready to add shards to a finished pack; what an interrupted run added is removed."""
    if was_interrupted(output):
        images = output / IMAGES
        if pack.images_size is not None and images.is_file() and images.stat().st_size > pack.images_size:
            os.truncate(images, pack.images_size)
        for path in set(shards_in(output)) - {output / shard.name for shard in pack.shards}:
            path.unlink()
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")


def finish_pack(output: Path, asked: dict[str, Any], *, shards: list[Shard], rejects: Rejects) -> PackSummary:
    """Write `pack.json`, and the rejects that it holds for people to read."""
    num_packed = sum(shard.num_samples for shard in shards)
    found = rejects.in_order()
    summary = PackSummary(
        seen=num_packed + len(found),
        packed=num_packed,
        rejected=len(found),
        shards=tuple(shard.name for shard in shards),
        rejects_by_reason=dict(Counter(reject.bad.error.kind for reject in found).most_common()),
    )
    described = {
        "input": asked,
        "shards": [asdict(shard) for shard in shards],
        "summary": asdict(summary),
        "rejects": [_row(reject) for reject in found],
        "images_size": (output / IMAGES).stat().st_size,
    }
    rejects.write()
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    (output / UNFINISHED).unlink()
    return summary


def shards_in(output: Path) -> list[Path]:
    """The shards in a folder, by their names, and those that were being written."""
    return [path for path in output.iterdir() if NAME.fullmatch(path.name.removesuffix(PART))]


def _row(reject: Reject) -> dict[str, Any]:
    bad = reject.bad
    return {
        "id": bad.id,
        "line": bad.line,
        "kind": bad.error.kind,
        "detail": bad.error.detail,
        "images": reject.images,
    }


def _reject(*, id: str | None, line: int, kind: str, detail: str, images: dict[str, State]) -> Reject:
    return Reject(BadRecord(line, id, BadSample(kind, detail)), images)


class Rejects:
    """The bad records so far; with `fail` they are written and raise `PackError` when found."""

    def __init__(self, path: Path, *, fail: bool, image_folder: Path) -> None:
        self.path = path
        self.fail = fail
        self.image_folder = image_folder
        self.found: list[Reject] = []

    def sift(self, entries: Iterator[Record | BadRecord]) -> list[Record]:
        """Keep the bad ones here, give the good ones; with `fail`, all are listed before it raises."""
        records: list[Record] = []
        for entry in entries:
            if isinstance(entry, Record):
                records.append(entry)
            else:
                self.found.append(Reject(entry, {}))
        self._stop_if_asked()
        return records

    def add(self, record: Record, images: dict[str, BadSample]) -> None:
        """A record some of whose images cannot be packed, and why; the first is the reason."""
        # Who may read a file shows neither in its size nor in its time: such a one is tried again each time.
        states = {
            image: None if error.kind == UNREADABLE else state_of(image, self.image_folder)
            for image, error in images.items()
        }
        error = next(iter(images.values()))
        self.found.append(Reject(BadRecord(record.line, record.id, error), states))
        self._stop_if_asked()

    def in_order(self) -> list[Reject]:
        """By the line of the annotations."""
        return sorted(self.found, key=lambda reject: reject.bad.line)

    def write(self) -> None:
        rows = [
            {"id": reject.bad.id, "line": reject.bad.line, "reason": reject.bad.error.reason}
            for reject in self.in_order()
        ]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _stop_if_asked(self) -> None:
        if self.fail and self.found:
            self.write()
            first = self.found[0].bad
            raise PackError(
                f"{len(self.found)} bad sample(s), first entry {first.line} (id {first.id}): "
                f"{first.error.reason}; correct what {self.path} lists, or set on_bad_sample to reject."
            )
