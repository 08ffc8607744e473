"""Answers of one model to one benchmark, a JSON line each, which a later run continues."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from pipeline.benchmarks.benchmark import BenchmarkQuestion
from pipeline.errors import PipelineError, writing

THEN = "give another --output, or remove the file to answer anew"


class AnswersFile(AbstractContextManager["AnswersFile"]):
    """A first line that says whose answers these are, and a line for each answer.

    Raises `PipelineError` for a file of other weights, another prompt or another version, and for a damaged one. A
    last line that was cut off is removed: its question is asked again.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path, self.identity = path, dict(identity)
        self.answers: dict[str, tuple[str, str]] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: IO[str] = open(path, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115 - `close` closes it
        try:
            self._lock()
            self._read()
        except BaseException:
            self.file.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _lock(self) -> None:
        """Hold the file until it is closed, so that two runs do not mix their answers."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise PipelineError(
                    f"{self.path}: another run writes it; wait for it, or give another --output"
                ) from error
            # A file system without locks: other runs go unnoticed.

    def _read(self) -> None:
        lines, torn = _whole_lines(self.path)
        if torn:
            with writing(self.path), open(self.path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._write([self.identity])
            return
        try:
            found, *rows = map(json.loads, lines)
            self.answers = {row["id"]: (row["asked"], row["answer"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise PipelineError(f"{self.path} is damaged: not every line is an answer; {THEN}") from error
        self._check(found)

    def _check(self, found: Any) -> None:
        """Raise `PipelineError` unless the file's identity is this one."""
        found = found if isinstance(found, dict) else {}
        names = sorted(self.identity.keys() | found.keys())
        other = [name for name in names if found.get(name) != self.identity.get(name)]
        if other:
            raise PipelineError(
                f"{self.path} holds answers with another {', '.join(other)}: {found.get(other[0])!r}, now "
                f"{self.identity.get(other[0])!r}; {THEN}"
            )

    def known(self, questions: Iterable[BenchmarkQuestion]) -> dict[str, str]:
        """Return the answers that are there, by question. Raises `PipelineError` if a question has changed since."""
        there: dict[str, str] = {}
        for question in questions:
            if question.id not in self.answers:
                continue
            asked, answer = self.answers[question.id]
            if asked != question.asked:
                raise PipelineError(
                    f"{self.path}: question {question.id} was another when it was answered; use the same data, or "
                    f"{THEN}"
                )
            there[question.id] = answer
        return there

    def add(self, questions: Sequence[BenchmarkQuestion], answers: Sequence[str]) -> None:
        """Write answers, so that an interruption loses none of them."""
        rows = [
            {"id": q.id, "asked": q.asked, "answer": answer}
            for q, answer in zip(questions, answers, strict=True)
        ]
        self._write(rows)
        self.answers |= {row["id"]: (row["asked"], row["answer"]) for row in rows}

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with writing(self.path):
            self.file.write("".join(json.dumps(row) + "\n" for row in rows))
            self.file.flush()


def _whole_lines(path: Path) -> tuple[list[bytes], bool]:
    """Return the lines that end with a line break, and whether something follows the last one."""
    *lines, rest = path.read_bytes().split(b"\n")
    return lines, bool(rest)
