"""The folder of a pack: finished (of which input), unfinished or not ours; its rejects, its summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.annotations import BadRecord, Record
from pipeline.errors import PackError
from pipeline.shard_writer import NAME, PART, Shard, write_whole

FINISHED = "pack.json"
UNFINISHED = "pack.unfinished.json"
REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class PackSummary:
    """What a pack holds; seen = packed + rejected."""

    seen: int
    packed: int
    rejected: int
    shards: tuple[str, ...]
    rejects_by_reason: dict[str, int]


def finished_pack(output: Path, asked: dict[str, Any]) -> PackSummary | None:
    """The summary of a finished pack of the same input, or None.

    Raises `PackError` if the pack is of other input, or no longer whole.
    """
    file = output / FINISHED
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_bytes())
        shards = [Shard(**shard) for shard in described["shards"]]
        summary = PackSummary(**{**described["summary"], "shards": tuple(shard.name for shard in shards)})
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
    for shard in shards:
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise PackError(
                f"{path} is missing or not {shard.size_bytes} bytes, as {FINISHED} says; "
                f"remove the folder {output} and pack again."
            )
    return summary


def begin_pack(output: Path, asked: dict[str, Any]) -> None:
    """An empty place for shards; what an unfinished pack left is removed, what others left is not."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; name a folder for the shards.")
    output.mkdir(parents=True, exist_ok=True)
    left = [path for path in output.iterdir() if NAME.fullmatch(path.name.removesuffix(PART))]
    if left and not (output / UNFINISHED).is_file():
        raise PackError(
            f"{output} already holds {left[0].name}, which is of no pack known here; name an empty folder."
        )
    write_whole(output / UNFINISHED, json.dumps(asked, indent=1) + "\n")
    for path in left:
        path.unlink()


def finish_pack(output: Path, asked: dict[str, Any], *, shards: list[Shard], rejects: Rejects) -> PackSummary:
    """Write the rejects and, last, `pack.json`."""
    num_packed = sum(shard.num_samples for shard in shards)
    summary = PackSummary(
        seen=num_packed + len(rejects.found),
        packed=num_packed,
        rejected=len(rejects.found),
        shards=tuple(shard.name for shard in shards),
        rejects_by_reason=dict(Counter(bad.error.kind for bad in rejects.found).most_common()),
    )
    rejects.write()
    described = {"input": asked, "shards": [asdict(shard) for shard in shards], "summary": asdict(summary)}
    write_whole(output / FINISHED, json.dumps(described, indent=1) + "\n")
    (output / UNFINISHED).unlink()
    return summary


class Rejects:
    """The bad records so far; with `fail` they are written and raise `PackError` when found."""

    def __init__(self, path: Path, *, fail: bool) -> None:
        self.path = path
        self.fail = fail
        self.found: list[BadRecord] = []

    def sift(self, entries: Iterator[Record | BadRecord]) -> list[Record]:
        """Keep the bad ones here, give the good ones; with `fail`, all are listed before it raises."""
        records: list[Record] = []
        for entry in entries:
            if isinstance(entry, Record):
                records.append(entry)
            else:
                self.found.append(entry)
        self._stop_if_asked()
        return records

    def add(self, bad: BadRecord) -> None:
        self.found.append(bad)
        self._stop_if_asked()

    def write(self) -> None:
        rows = [
            {"id": bad.id, "line": bad.line, "reason": bad.error.reason}
            for bad in sorted(self.found, key=lambda bad: bad.line)
        ]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def _stop_if_asked(self) -> None:
        if self.fail and self.found:
            self.write()
            first = self.found[0]
            raise PackError(
                f"{len(self.found)} bad sample(s), first entry {first.line} (id {first.id}): "
                f"{first.error.reason}; correct what {self.path} lists, or set on_bad_sample to reject."
            )
