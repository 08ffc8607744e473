"""ScienceQA-IMG: the test questions that have an image, answered by a letter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmarks.benchmark import (
    LETTER_ANSWER,
    Answered,
    Benchmark,
    BenchmarkQuestion,
    ImagePlace,
    MeanScore,
)
from pipeline.benchmarks.files import (
    field_of,
    find,
    found,
    image_file,
    list_of,
    parquet_files,
    parquet_rows,
    read_json,
    text_of,
)
from pipeline.errors import PipelineError

OPTIONS = "ABCDE"
REFERENCE = re.compile(
    r"(?:The answer is )?([A-E])\.?"
)  # LLaVA's script that makes its file writes sentences
ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
GET = (
    "put problems.json, pid_splits.json and images/test/ there, from data/scienceqa of "
    "github.com/lupantech/ScienceQA, or LLaVA's llava_test_CQM-A.json with images/test/, or the Parquet files of "
    "lmms-lab-encoder/ScienceQA (ScienceQA-IMG); licence CC BY-NC-SA 4.0"
)


def read_scienceqa(folder: Path) -> list[BenchmarkQuestion]:
    """Return the questions with an image. LLaVA's file, which holds the prompts themselves, comes first."""
    if (file := find(folder, "llava_test_CQM-A.json")) is not None:
        return _read_llava(file, folder)
    if find(folder, "problems.json") is None and (
        files := parquet_files(folder, "test", subset="ScienceQA-IMG")
    ):
        return _read_parquet(files)
    problems = read_json(found(folder, "problems.json", get=GET), dict)
    file = found(folder, "pid_splits.json", get=GET)
    images = _images(folder)
    questions: list[BenchmarkQuestion] = []
    for number in field_of(read_json(file, dict), "test", where=str(file)):
        row = field_of(problems, number, where=f"{folder}, problems.json")
        where = f"{folder}, problem {number}"
        if field_of(row, "image", where=where):
            place = image_file(images, f"{number}/{row['image']}", get=GET)
            questions.append(_from_problem(number, row, place, where))
    return questions


def _read_llava(file: Path, folder: Path) -> list[BenchmarkQuestion]:
    images = _images(folder)
    questions: list[BenchmarkQuestion] = []
    for number, row in enumerate(read_json(file, list)):
        where = f"{file}, entry {number}"
        name = text_of(row, "id", where=where)
        if not row.get("image"):
            continue
        turns = [text_of(turn, "value", where=where) for turn in list_of(row, "conversations", where=where)]
        if len(turns) < 2:
            raise PipelineError(
                f"{where}: {len(turns)} turns, no question with an answer; use the published file"
            )
        text, place = turns[0].replace("<image>", "").strip(), image_file(images, str(row["image"]), get=GET)
        letter = REFERENCE.fullmatch(turns[1].strip())
        questions.append(_question(name, text, place, letter[1] if letter else turns[1], where))
    return questions


def _read_parquet(files: Sequence[Path]) -> list[BenchmarkQuestion]:
    columns = ["question", "choices", "answer", "hint"]
    rows = enumerate(parquet_rows(files, columns))
    return [
        _from_problem(str(number), row, place, f"{place.path}, row {number}") for number, (row, place) in rows
    ]


def _images(folder: Path) -> Path:
    return find(folder, "images/test") or find(folder, "test") or found(folder, "images", get=GET)


def _from_problem(number: str, row: Mapping[str, Any], place: ImagePlace, where: str) -> BenchmarkQuestion:
    question, choices = text_of(row, "question", where=where), list_of(row, "choices", where=where)
    answer = field_of(row, "answer", where=where)
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(OPTIONS):
        raise PipelineError(f"{where}: answer {answer!r} of {len(choices)} choices; use the published file")
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(OPTIONS, choices, strict=False))
    return _question(number, f"{context}{question}\n{options}", place, OPTIONS[answer], where)


def _question(number: str, text: str, place: ImagePlace, answer: str, where: str) -> BenchmarkQuestion:
    if answer not in tuple(OPTIONS):
        raise PipelineError(
            f"{where}: the answer {answer!r} is no letter of {OPTIONS}; use the published file"
        )
    return BenchmarkQuestion(number, text + LETTER_ANSWER, place, number, answer)


def parsed(answer: str) -> str:
    """Return the letter that an answer gives by the original's rules, FAILED for none.

    A letter alone, a letter with ". " after it, or one "The answer is X" with any character after the letter.
    """
    if answer in tuple(OPTIONS):
        return answer
    if len(answer) >= 3 and answer[0] in OPTIONS and answer[1:3] == ". ":
        return answer[0]
    letters = ANSWER_IS.findall(answer)
    return letters[0] if len(letters) == 1 else "FAILED"


def score_scienceqa(answered: Answered) -> float:
    """Return 1 for the right letter; an answer without letter is wrong."""
    return float(parsed(answered.answer) == answered.question.reference)


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="SQA-I",
    folders=("scienceqa", "ScienceQA", "sqa"),
    split="test, questions with an image",
    licence="CC BY-NC-SA 4.0",
    source=GET,
    prompt="context, question and options, and a line that asks for the option's letter",
    metric="accuracy, %",
    max_new_tokens=1024,
    num_questions=(2_017,),
    read=read_scienceqa,
    scorer=MeanScore(score_scienceqa),
    crops=True,
)
