"""GQA: one word or phrase, compared with the reference letter by letter."""

from __future__ import annotations

from pathlib import Path

from pipeline.benchmarks.benchmark import SHORT_ANSWER, Answered, Benchmark, BenchmarkQuestion, MeanScore
from pipeline.benchmarks.files import (
    columns_of,
    find,
    found,
    image_file,
    parquet_files,
    parquet_rows,
    read_json,
    text_of,
)
from pipeline.benchmarks.places import ParquetImage
from pipeline.errors import PipelineError

QUESTIONS = "testdev_balanced_questions.json"
GET = (
    f"put {QUESTIONS} and images/ there, from cs.stanford.edu/people/dorarad/gqa/download.html, or the Parquet files "
    "of lmms-lab-encoder/GQA (testdev_balanced_instructions and testdev_balanced_images); licence CC BY 4.0"
)


def read_gqa(folder: Path) -> list[BenchmarkQuestion]:
    """Return the questions of the balanced testdev split, questions of one image together."""
    questions = _read_parquet(folder) if find(folder, QUESTIONS) is None else _read_official(folder)
    return questions or _none_in(folder)


def _read_official(folder: Path) -> list[BenchmarkQuestion]:
    file = found(folder, QUESTIONS, get=GET)
    images = found(folder, "images", get=GET)
    questions: list[BenchmarkQuestion] = []
    for number, entry in read_json(file, dict).items():
        where = f"{file}, question {number}"
        image, text, answer = (
            text_of(entry, name, where=where) for name in ("imageId", "question", "answer")
        )
        place = image_file(images, f"{image}.jpg", get=GET)
        questions.append(BenchmarkQuestion(number, text + SHORT_ANSWER, place, image, answer))
    return questions


def _read_parquet(folder: Path) -> list[BenchmarkQuestion]:
    files = parquet_files(folder, "testdev", subset="testdev_balanced")
    asked = [file for file in files if "question" in columns_of(file)]
    shown = [file for file in files if file not in asked]
    places: dict[str, ParquetImage] = {str(row["id"]): place for row, place in parquet_rows(shown, ["id"])}
    order = {image: number for number, image in enumerate(places)}
    questions: list[BenchmarkQuestion] = []
    for row, place in parquet_rows(asked, ["id", "imageId", "question", "answer"], image=None):
        name, image, question, answer = (
            text_of(row, column, where=str(place.path)) for column in ("id", "imageId", "question", "answer")
        )
        if image not in places:
            raise PipelineError(f"{folder}: no Parquet file holds the image {image} of {name}; {GET}")
        questions.append(BenchmarkQuestion(name, question + SHORT_ANSWER, places[image], image, answer))
    return sorted(questions, key=lambda question: order[question.image_id])  # each row group is read once


def _none_in(folder: Path) -> list[BenchmarkQuestion]:
    found(folder, QUESTIONS, get=GET)
    raise PipelineError(f"{folder}: no question in its files; {GET}")


def score_gqa(answered: Answered) -> float:
    """Return 1 for the reference itself: the answer in lower case, without full stops at its end."""
    return float(answered.answer.rstrip(".").lower() == answered.question.reference)


GQA = Benchmark(
    name="gqa",
    title="GQA",
    folders=("gqa", "GQA"),
    split="testdev, balanced",
    licence="CC BY 4.0; the images have the terms of Visual Genome",
    source=GET,
    prompt="the question, and a line that asks for a single word or phrase",
    metric="accuracy, %",
    max_new_tokens=128,
    num_questions=(12_578,),
    read=read_gqa,
    scorer=MeanScore(score_gqa),
)
