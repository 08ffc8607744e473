"""MMBench (dev, English): a question counts if it is answered correctly in every rotation of its options."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from pipeline.benchmarks.benchmark import (
    LETTER_ANSWER,
    Answered,
    Benchmark,
    BenchmarkQuestion,
    Counted,
    ImagePlace,
    Totals,
    ratio,
)
from pipeline.benchmarks.files import MissingFile, parquet_files, parquet_rows, text_of
from pipeline.benchmarks.places import TableImage
from pipeline.errors import PipelineError, reason_of

TABLES = ("mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_20230712.tsv")
GET = (
    f"put {TABLES[0]} there, from download.openmmlab.com/mmclassification/datasets/mmbench/, or the Parquet files of "
    "lmms-lab-encoder/MMBench (en, dev); licence Apache-2.0"
)
LETTERS = "ABCD"
ROTATION = 1_000_000  # a rotation's index is that of its question plus a multiple of this
MAX_FIELD = 64 * 2**20
LONGEST_REFERENCE = 64  # characters: a shorter image field names the row that holds the image
# What pandas reads as missing, with which the original reads the table; "Na", sodium, is none of these.
ABSENT = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
ABSENT_IN_ANY_CASE = ("nan", "none")  # the original's own test
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
LAST_WORDS = 5
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_mmbench(folder: Path) -> list[BenchmarkQuestion]:
    """Return the questions and their rotations."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None and (files := parquet_files(folder, "dev", subset="en")):
        rows = parquet_rows(files, ["index", "question", "hint", "answer", *LETTERS])
        return [
            _question(row, place, _unit(row["index"], str(place.path)), str(place.path))
            for row, place in rows
        ]
    if table is None:
        raise MissingFile(f"{folder}: {TABLES[0]} is missing; {GET}")
    return list(_read_table(table))


def _read_table(table: Path) -> Iterator[BenchmarkQuestion]:
    places: dict[str, tuple[ImagePlace, str]] = {}
    for row, start, length, columns in _rows(table):
        named = row.get("image") or ""
        if len(named) <= LONGEST_REFERENCE and named in places:
            place, digest = places[named]
        else:
            place, digest = (
                TableImage(table, start, length, columns["image"]),
                blake3(named.encode()).hexdigest(),
            )
        places[row["index"]] = place, digest
        yield _question(row, place, digest[:16], f"{table}, row {row['index']}")


def _rows(table: Path) -> Iterator[tuple[dict[str, str], int, int, dict[str, int]]]:
    """Yield each row, the bytes in which it stands, and the number of each column."""
    csv.field_size_limit(MAX_FIELD)
    with open(table, "rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter="\t")
        try:
            columns = {name: number for number, name in enumerate(next(reader, []))}
            if absent := {"index", "question", "answer", "image", "A", "B"} - set(columns):
                raise PipelineError(f"{table}: no column {', '.join(sorted(absent))}; {GET}")
            start = lines.position
            for cells in reader:
                if not cells:  # a blank line
                    start = lines.position
                    continue
                if len(cells) != len(columns):
                    raise PipelineError(
                        f"{table}: a row of {len(cells)} cells at byte {start}; download it again"
                    )
                row = dict(zip(columns, cells, strict=True))
                yield row, start, lines.position - start, columns
                start = lines.position
        except (csv.Error, UnicodeDecodeError) as error:
            raise PipelineError(f"{table} is no table ({reason_of(error)}); download it again") from error


class _Lines:
    """The lines of a file as text, and how many bytes of it were read."""

    def __init__(self, file: Any):
        self.file, self.position = file, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line: bytes = next(self.file)
        text = line.decode("utf-8" if self.position else "utf-8-sig")
        self.position += len(line)
        return text


def _question(row: Mapping[str, Any], place: ImagePlace, image_id: str, where: str) -> BenchmarkQuestion:
    options: list[str] = []
    for letter in LETTERS:
        if _is_absent(row.get(letter)):
            break
        options.append(str(row[letter]))
    if (answer := str(row["answer"]).strip()) not in tuple(LETTERS[: len(options)]):
        raise PipelineError(
            f"{where}: the answer {answer!r} is none of {len(options)} options; use the dev split"
        )
    hint = "" if _is_absent(row.get("hint")) else f"{row['hint']}\n"
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    number = _index(row["index"], where)
    return BenchmarkQuestion(
        str(number),
        hint + "\n".join([text_of(row, "question", where=where), *lines]) + LETTER_ANSWER,
        place,
        image_id,
        answer,
        unit=_unit(number, where),
        options=tuple(options),
    )


def _unit(index: Any, where: str) -> str:
    """Return the index of the question that a row is a rotation of."""
    return str(_index(index, where) % ROTATION)


def _index(value: Any, where: str) -> int:
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise PipelineError(f"{where}: the index {value!r} is no number; download the table again") from None


def _is_absent(value: Any) -> bool:
    return value is None or str(value) in ABSENT or str(value).lower() in ABSENT_IN_ANY_CASE


def chosen(answer: str, options: Sequence[str]) -> str:
    """Return the letter that an answer gives, by VLMEvalKit's exact matching; Z for none.

    The only option letter among the words, near the end; else "answer is X"; else the only option whose text occurs.
    A refusal is none, whatever it says besides.
    """
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    letters = LETTERS[: len(options)]
    words = answer.translate(MARKS).split()
    there = [letter for letter in letters if letter in words]
    if len(there) == 1 and words.index(there[0]) > len(words) - LAST_WORDS:
        return there[0]
    if not there and "Z" in words:
        return "Z"
    stated = ANSWER_IS.search(answer)
    if stated and stated[1].upper() in letters:
        return stated[1].upper()
    return _by_text(answer.lower(), dict(zip(letters, map(str.lower, options), strict=True)))


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    if len(answer) > 2 * sum(map(len, options.values())):
        return "Z"
    named = [letter for letter, option in options.items() if option in answer]
    return named[0] if len(named) == 1 else "Z"


class MmbenchScorer:
    """The share of questions whose every rotation is right (circular), and of all rows that are right."""

    def count(self, answered: Sequence[Answered]) -> list[Counted]:
        units: dict[str, list[Answered]] = defaultdict(list)
        for one in answered:
            units[one.question.unit].append(one)
        return [self._counted(rows) for rows in units.values()]

    def _counted(self, rows: Sequence[Answered]) -> Counted:
        right = [chosen(one.answer, one.question.options) == one.question.reference for one in rows]
        first = min(range(len(rows)), key=lambda n: int(rows[n].question.id))
        counts = {"circular": all(right), "vanilla": right[first], "questions": 1, "rows": len(rows)}
        return Counted(
            rows[0].question.image_id,
            {name: float(n) for name, n in (counts | {"right rows": sum(right)}).items()},
        )

    def measures(self, totals: Totals) -> dict[str, np.ndarray]:
        return {
            "circular": 100 * ratio(totals["circular"], totals["questions"]),
            "vanilla": 100 * ratio(totals["vanilla"], totals["questions"]),
            "rows": 100 * ratio(totals["right rows"], totals["rows"]),
            "rotations": ratio(totals["rows"], totals["questions"]),
        }


MMBENCH = Benchmark(
    name="mmbench",
    title="MMB-dev",
    folders=("mmbench", "MMBench"),
    split="dev, English, 2023-10-03, with rotations",
    licence="Apache-2.0; the images have the terms of their sources",
    source=GET,
    prompt="hint, question and options, and a line that asks for the option's letter",
    metric="circular accuracy, %",
    max_new_tokens=1024,
    num_questions=(4_329,),
    read=read_mmbench,
    scorer=MmbenchScorer(),
)
