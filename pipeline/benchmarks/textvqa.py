"""TextVQA: short answers about text in images, with OCR tokens in the prompt as in the paper, or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.benchmarks.benchmark import SHORT_ANSWER, Answered, Benchmark, BenchmarkQuestion, MeanScore
from pipeline.benchmarks.files import (
    find,
    found,
    image_file,
    list_of,
    parquet_files,
    parquet_rows,
    read_json,
    read_lines,
    text_of,
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
    prompt = _prompts_with_ocr(folder) if with_ocr else lambda image, question: _prompt(question, None)
    questions: list[BenchmarkQuestion] = []
    for number, row in enumerate(list_of(read_json(file, dict), "data", where=str(file))):
        where = f"{file}, entry {number}"
        image, text = (text_of(row, name, where=where) for name in ("image_id", "question"))
        place = image_file(images, f"{image}.jpg", get=GET)
        name = str(row.get("question_id", number))
        questions.append(BenchmarkQuestion(name, prompt(image, text), place, image, _answers(row, where)))
    return questions


def _read_parquet(files: Sequence[Path], with_ocr: bool) -> list[BenchmarkQuestion]:
    columns = ["image_id", "question_id", "question", "answers", *(["ocr_tokens"] if with_ocr else [])]
    questions: list[BenchmarkQuestion] = []
    for number, (row, place) in enumerate(parquet_rows(files, columns)):
        where = f"{place.path}, row {number}"
        name, image, question = (
            text_of(row, column, where=where) for column in ("question_id", "image_id", "question")
        )
        text = _prompt(question, _tokens(row, where) if with_ocr else None)
        questions.append(BenchmarkQuestion(name, text, place, image, _answers(row, where)))
    return questions


def _prompt(question: str, ocr: str | None) -> str:
    return question.capitalize() + ("" if ocr is None else f"\nReference OCR token: {ocr}") + SHORT_ANSWER


def _answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    answers = tuple(map(str, list_of(row, "answers", where=where)))
    if len(answers) != NUM_ANSWERS:
        raise PipelineError(
            f"{where}: {len(answers)} answers, where TextVQA has ten; use the validation split"
        )
    return answers


def _tokens(row: Mapping[str, Any], where: str) -> str:
    return ", ".join(map(str, list_of(row, "ocr_tokens", where=where)))


def _prompts_with_ocr(folder: Path) -> Callable[[str, str], str]:
    """Return what gives (image, question) a prompt: LLaVA's own, letter by letter, or one made of the OCR tokens."""
    if (file := find(folder, PROMPTS)) is not None:
        prompts = dict(
            _of_prompt(row, f"{file}, line {n}") for n, row in enumerate(read_lines(file), start=1)
        )
        return lambda image, question: _known(prompts, (image, question.lower()), folder, image, question)
    file = found(folder, OCR, get=GET)
    rows = list_of(read_json(file, dict), "data", where=str(file))
    tokens = {text_of(row, "image_id", where=str(file)): _tokens(row, str(file)) for row in rows}
    return lambda image, question: _prompt(question, _known(tokens, image, folder, image, question))


def _of_prompt(row: Mapping[str, Any], where: str) -> tuple[Key, str]:
    """Return (image, question in lower case), by which LLaVA's scorer finds a question, and its prompt."""
    text, image = (text_of(row, name, where=where) for name in ("text", "question_id"))
    lines = text.split("\n")
    if len(lines) != 3 or not lines[1].startswith("Reference OCR token: "):
        raise PipelineError(f"{where}: no question, OCR tokens and suffix in three lines; use LLaVA's file")
    return (image, lines[0].lower()), text


def _known(texts: Mapping[Any, str], key: Any, folder: Path, image: str, question: str) -> str:
    if key not in texts:
        raise PipelineError(f"{folder}: no OCR tokens for the question {question!r} about {image}; {GET}")
    return texts[key]


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
