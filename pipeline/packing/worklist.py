"""The entries that a pack works on, on the disk: a million of them do not fit into memory with their texts."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from blake3 import blake3

from pipeline.packing.annotations import BadRecord, Record
from pipeline.packing.images import Image

MAX_BYTES = 64 << 20  # of the records of a group that are in memory at once
FILE = "pack.worklist.sqlite"
TABLES = """
PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA locking_mode=EXCLUSIVE;
CREATE TABLE ids (id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE firsts (image PRIMARY KEY, line INTEGER) WITHOUT ROWID;
CREATE TABLE records (first INTEGER, line INTEGER, id TEXT, repeat INTEGER, json BLOB, images TEXT,
                      PRIMARY KEY (first, line)) WITHOUT ROWID;
CREATE TABLE rejects (line INTEGER PRIMARY KEY, kind TEXT, row TEXT);
"""


class Worklist(AbstractContextManager["Worklist"]):
    """A scratch SQLite file in a pack's folder, removed at the end: ids, good entries by image, and rejects."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.path.unlink(missing_ok=True)
        self.database = sqlite3.connect(self.path, isolation_level=None)
        self.database.executescript(TABLES)
        self.database.execute("BEGIN")  # and no end: nobody reads the file but this process

    def __exit__(self, *_: object) -> None:
        self.database.close()
        self.path.unlink(missing_ok=True)

    def count(self, identity: str) -> int:
        """Return how often this was called with an id, from 1."""
        [[number]] = self.database.execute(
            "INSERT INTO ids VALUES (?, 1) ON CONFLICT DO UPDATE SET number = number + 1 RETURNING number",
            (identity,),
        )
        return number

    def add(self, record: Record) -> None:
        """Add a good entry."""
        first = record.line
        if record.images:
            image = record.images[0]
            values = (image if isinstance(image, str) else blake3(image).digest(), record.line)
            self.database.execute("INSERT OR IGNORE INTO firsts VALUES (?, ?)", values)
            [[first]] = self.database.execute("SELECT line FROM firsts WHERE image = ?", values[:1])
        images = json.dumps([_as_json(image) for image in record.images])
        row = (first, record.line, record.id, record.repeat, record.json, images)
        self.database.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", row)

    @property
    def num_records(self) -> int:
        return self._number_in("records")

    @property
    def num_rejects(self) -> int:
        return self._number_in("rejects")

    def groups(self, limit: int) -> Iterator[list[Record]]:
        """Yield the records of each first image, by first appearance: `limit` at once, of large ones fewer.

        A text-only record is a group of its own.
        """
        rows = self.database.execute("SELECT * FROM records ORDER BY first, line")
        for _, of_image in groupby(rows, key=lambda row: row[0]):
            records = (_record(*row) for row in of_image)
            while group := _at_most(records, limit):
                yield group

    def reject(self, bad: BadRecord) -> None:
        row = json.dumps(asdict(bad))  # in ASCII: a detail may hold text that is no valid Unicode
        self.database.execute("INSERT OR REPLACE INTO rejects VALUES (?, ?, ?)", (bad.line, bad.kind, row))

    def rejects(self) -> Iterator[BadRecord]:
        """Yield the bad entries by their lines."""
        for [row] in self.database.execute("SELECT row FROM rejects ORDER BY line"):
            yield BadRecord(**json.loads(row))

    def rejects_by_reason(self) -> dict[str, int]:
        """Return how many entries were rejected for each kind of reason, the most frequent first."""
        return dict(
            self.database.execute(
                "SELECT kind, COUNT(*) AS n FROM rejects GROUP BY kind ORDER BY n DESC, MIN(line)"
            )
        )

    def _number_in(self, table: str) -> int:
        [[number]] = self.database.execute(f"SELECT COUNT(*) FROM {table}")
        return number


def _at_most(records: Iterator[Record], limit: int) -> list[Record]:
    """Return the next records: `limit`, or fewer that hold `MAX_BYTES` of texts and images themselves."""
    taken: list[Record] = []
    size = 0
    while len(taken) < limit and size < MAX_BYTES and (record := next(records, None)):
        taken.append(record)
        size += len(record.json) + sum(len(image) for image in record.images)
    return taken


def _record(_first: int, line: int, identity: str, repeat: int, text: bytes, images: str) -> Record:
    return Record(line, identity, repeat, text, tuple(map(_as_image, json.loads(images))))


def _as_json(image: Image) -> str | list[str]:
    return image if isinstance(image, str) else [base64.b64encode(image).decode()]


def _as_image(value: str | list[str]) -> Image:
    return value if isinstance(value, str) else base64.b64decode(value[0])
