"""TextVQA: short answers about text in images, with OCR tokens in the prompt as in the paper, or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.benchmarks.benchmark import SHORT_ANSWER, Answered, Benchmark, BenchmarkQuestion, MeanScore
from pipeline.benchmarks.files import (
    field_of,
    find,
    found,
    image_file,
    parquet_files,
    parquet_rows,
    read_json,
    read_lines,
)
from pipeline.benchmarks.vqa_answers import vqa_accuracy
from pipeline.errors import PipelineError

ANNOTATIONS = "TextVQA_0.5.1_val.json"
PROMPTS = "llava_textvqa_val_v051_ocr.jsonl"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
NUM_ANSWERS = 10
GET = (
    f"put {ANNOTATIONS} and train_images/ there, from textvqa.org, with the OCR tokens in {OCR} (textvqa.org) or in "
    f"LLaVA's {PROMPTS}, or the Parquet files of lmms-lab-encoder/textvqa; licence CC BY 4.0"
)
Key = tuple[str, str]


def read_textvqa(folder: Path, *, with_ocr: bool) -> list[BenchmarkQuestion]:
    """Return the questions of the validation split."""
    files = parquet_files(folder, "validation")
    if files and find(folder, ANNOTATIONS) is None:
        return _read_parquet(files, with_ocr)
    file = found(folder, ANNOTATIONS, get=GET)
    images = found(folder, "train_images", get=GET)
    tokens = _ocr_texts(folder) if with_ocr else {}
    questions: list[BenchmarkQuestion] = []
    for number, row in enumerate(field_of(read_json(file, dict), "data", where=str(file))):
        where = f"{file}, entry {number}"
        image, text = (str(field_of(row, name, where=where)) for name in ("image_id", "question"))
        ocr = _tokens_for(tokens, image, text, folder) if with_ocr else None
        place = image_file(images, f"{image}.jpg", get=GET)
        name = str(row.get("question_id", number))
        questions.append(BenchmarkQuestion(name, _prompt(text, ocr), place, image, _answers(row, where)))
    return questions


def _read_parquet(files: Sequence[Path], with_ocr: bool) -> list[BenchmarkQuestion]:
    columns = ["image_id", "question_id", "question", "answers", *(["ocr_tokens"] if with_ocr else [])]
    questions: list[BenchmarkQuestion] = []
    for number, (row, place) in enumerate(parquet_rows(files, columns)):
        ocr = ", ".join(row["ocr_tokens"]) if with_ocr else None
        answers = _answers(row, f"{place.path}, row {number}")
        text = _prompt(row["question"], ocr)
        questions.append(BenchmarkQuestion(str(row["question_id"]), text, place, row["image_id"], answers))
    return questions


def _prompt(question: str, ocr: str | None) -> str:
    return question.capitalize() + ("" if ocr is None else f"\nReference OCR token: {ocr}") + SHORT_ANSWER


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = tuple(map(str, field_of(row, "answers", where=where) or ()))
    if len(answers) != NUM_ANSWERS:
        raise PipelineError(
            f"{where}: {len(answers)} answers, where TextVQA has ten; use the validation split"
        )
    return answers


def _ocr_texts(folder: Path) -> dict[Key, str]:
    """Return (image, question in lower case) -> OCR tokens as LLaVA's prompts hold them; '' is any question."""
    if (file := find(folder, PROMPTS)) is not None:
        return dict(_of_prompt(row, f"{file}, line {n}") for n, row in enumerate(read_lines(file), start=1))
    file = found(folder, OCR, get=GET)
    rows = field_of(read_json(file, dict), "data", where=str(file))
    return {
        (str(field_of(row, "image_id", where=str(file))), ""): ", ".join(
            field_of(row, "ocr_tokens", where=str(file))
        )
        for row in rows
    }


def _of_prompt(row: Mapping[str, Any], where: str) -> tuple[Key, str]:
    lines = str(field_of(row, "text", where=where)).split("\n")
    if len(lines) != 3 or not lines[1].startswith("Reference OCR token: "):
        raise PipelineError(f"{where}: no question, OCR tokens and suffix in three lines; use LLaVA's file")
    image = str(field_of(row, "question_id", where=where))
    return (image, lines[0].lower()), lines[1].removeprefix("Reference OCR token: ")


def _tokens_for(tokens: Mapping[Key, str], image: str, question: str, folder: Path) -> str:
    for key in ((image, question.lower()), (image, "")):
        if key in tokens:
            return tokens[key]
    raise PipelineError(f"{folder}: no OCR tokens for the question {question!r} about {image}; {GET}")


def score_textvqa(answered: Answered) -> float:
    """Return the VQA accuracy of an answer."""
    return vqa_accuracy(answered.answer, answered.question.reference)


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    folders=("textvqa", "TextVQA"),
    split="validation, v0.5.1",
    licence="CC BY 4.0; the images are Open Images'",
    source=GET,
    prompt="the question, its OCR tokens, and a line that asks for a single word or phrase",
    metric="VQA accuracy, %",
    max_new_tokens=128,
    num_questions=(5_000,),
    read=partial(read_textvqa, with_ocr=True),
    scorer=MeanScore(score_textvqa),
)

TEXTVQA_NO_OCR = replace(
    TEXTVQA,
    name="textvqa-no-ocr",
    title="TextVQA, no OCR",
    prompt="the question, and a line that asks for a single word or phrase: lmms-eval's textvqa_val",
    read=partial(read_textvqa, with_ocr=False),
    in_average=False,
)
