"""The folder of a pack: finished (of which input), unfinished or not ours; its rejects, its summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.annotations import BadRecord, Record
from pipeline.errors import BadSample, PackError
from pipeline.pack_images import State, changed_images, state_of
from pipeline.shard_writer import NAME, PART, Shard, write_whole

FINISHED = "pack.json"
UNFINISHED = "pack.unfinished.json"
REJECTS = "rejects.jsonl"
IMAGES = "pack.images.jsonl"
UNREADABLE = "unreadable image file"


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
    """A finished pack of the input that is asked for."""

    summary: PackSummary
    shards: list[Shard]
    rejects: list[Reject]


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
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(
            f"{file} cannot be read ({error}); remove the folder {output} and pack again."
        ) from error
    for name, value in asked.items():
        if found.get(name) != value:
            raise PackError(
                f"{output} holds a pack of other input: {name} was {found.get(name)}, now {value}; "
                f"remove the folder {output}, or name another output."
            )
    return FinishedPack(summary, shards, rejects)


def check_finished(output: Path, pack: FinishedPack, *, image_folder: Path) -> None:
    """Raise `PackError` if a shard is gone, or holds images that have changed since."""
    for shard in pack.shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise PackError(
                f"{path} is missing or not {shard.size_bytes} bytes, as {FINISHED} says; "
                f"restore it, or pack everything again with --again."
            )
    if changed := changed_images(output / IMAGES, image_folder):
        raise PackError(
            f"{len(changed)} image(s) changed after they were packed, first {changed[0]}; {output} holds what they "
            "were, and nothing was done: restore them, or pack everything again with --again."
        )


def begin_pack(output: Path, asked: dict[str, Any]) -> None:
    """An empty place for shards; what a pack of ours left is removed, what others left is not."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; name a folder for the shards.")
    output.mkdir(parents=True, exist_ok=True)
    left = _shards_in(output)
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
    """Make ready to add shards to a finished pack; those that an interrupted run added are removed."""
    if was_interrupted(output):
        for path in set(_shards_in(output)) - {output / shard.name for shard in pack.shards}:
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
    }
    rejects.write()
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    (output / UNFINISHED).unlink()
    return summary


def _shards_in(output: Path) -> list[Path]:
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
