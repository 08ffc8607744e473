"""The records of a sweep: `runs.jsonl`, a line of JSON for each run, and `questions.json`, what all were asked.

With `teacher.json` they are all that a summary and a later sweep need: the runs' own folders may be deleted. Which
questions a run answered correctly is stored as bits, zlib-compressed, in base64.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.provenance import replace_text
from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered
from pipeline.evaluation.predictions import Prediction, accuracy_by_type, by_test_set

SWEEP = "sweep.json"  # the config, and the identity of every run by its name
SUMMARY = "summary.json"
RUNS = "runs.jsonl"
QUESTIONS = "questions.json"
TEACHER = "teacher.json"

Line = dict[str, Any]


def read_lines(folder: Path) -> list[Line]:
    """Return the lines of `runs.jsonl`, oldest first. Raises `PipelineError` naming a damaged one."""
    file = folder / RUNS
    lines: list[Line] = []
    for number, text in enumerate(file.read_text().splitlines() if file.is_file() else [], start=1):
        try:
            line = json.loads(text)
            lines.append(line | {"name": line["name"], "identity": line["identity"]})
        except (ValueError, TypeError, KeyError) as error:
            raise PipelineError(f"{file}: line {number} is not a run; remove it to run it again") from error
    return lines


def write_line(folder: Path, line: Line, answered: Mapping[str, Answered]) -> Line:
    """Add a run's line with its answers by test set, in place of an older one of its name, and return it."""
    line = _with_answers(folder, line, answered)
    others = [known for known in read_lines(folder) if known["name"] != line["name"]]
    replace_text(folder / RUNS, "".join(json.dumps(known) + "\n" for known in [*others, line]))
    return json.loads(json.dumps(line))  # as a later sweep reads it


def keep_teacher(folder: Path, predictions: Sequence[Prediction]) -> None:
    """Write `teacher.json`: the teacher's accuracy and answers, as in a run's line."""
    sets = by_test_set(predictions)
    line = {"name": "teacher", "accuracy": {name: accuracy_by_type(of_set) for name, of_set in sets.items()}}
    line = _with_answers(folder, line, {name: Answered.of(of_set) for name, of_set in sets.items()})
    replace_text(folder / TEACHER, json.dumps(line) + "\n")


def read_teacher(folder: Path) -> Line | None:
    """Return the teacher's line; None if it was not evaluated."""
    return _read_json(folder / TEACHER, "remove it and run the sweep again")


def read_answers(folder: Path, line: Line) -> dict[str, Answered]:
    """Return a line's answers by test set. Raises `PipelineError` if their questions are missing or do not match."""
    questions = _read_questions(folder)
    answered = {}
    for test_set, (digest, packed) in line["answers"].items():
        if digest not in questions:
            raise PipelineError(
                f"{folder / QUESTIONS} lacks the questions of {line['name']}; remove its line to run it again"
            )
        groups = np.array(questions[digest]["groups"])
        answered[test_set] = Answered(digest, groups, _unpacked(packed, len(groups), line["name"]))
    return answered


def _with_answers(folder: Path, line: Line, answered: Mapping[str, Answered]) -> Line:
    """Add the answers to a line as bits, and the questions, if new, to `questions.json`."""
    known = _read_questions(folder)
    asked = {a.questions: {"test_set": name, "groups": a.groups.tolist()} for name, a in answered.items()}
    if asked.keys() - known.keys():
        replace_text(folder / QUESTIONS, json.dumps(known | asked, separators=(",", ":")) + "\n")
    return line | {"answers": {name: [a.questions, _packed(a.correct)] for name, a in answered.items()}}


def _read_questions(folder: Path) -> dict[str, Any]:
    return _read_json(folder / QUESTIONS, f"remove it and {RUNS} to run the sweep again") or {}


def _read_json(file: Path, remedy: str) -> Any:
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise PipelineError(f"{file} is not JSON; {remedy}") from error


def _packed(correct: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(correct).tobytes(), 9)).decode()


def _unpacked(text: str, count: int, name: str) -> np.ndarray:
    """Return `count` bits. The file may be foreign, so no more than they take is decompressed."""
    size = (count + 7) // 8
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise PipelineError(
            f"{RUNS}: the answers of {name} are damaged; remove its line to run it again"
        ) from error
    if len(data) != size:
        raise PipelineError(f"{RUNS}: {name} answers another number of questions than {QUESTIONS} says")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count).astype(bool)
