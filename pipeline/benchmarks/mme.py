"""MME, perception: two yes-or-no questions an image; a sub-task scores its accuracy and its share of right pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.benchmarks.benchmark import (
    SHORT_ANSWER,
    Answered,
    Benchmark,
    BenchmarkQuestion,
    Counted,
    ImagePlace,
    Totals,
    ratio,
)
from pipeline.benchmarks.files import MissingFile, find, parquet_files, parquet_rows, text_of
from pipeline.benchmarks.places import ImageFile
from pipeline.errors import PipelineError, reason_of

PERCEPTION = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
)
ENDINGS = (".jpg", ".png", ".jpeg")
ITS_OWN_SUFFIX = "Please answer yes or no."
GET = (
    "put MME's folders there (existence/, count/, ... with images and .txt files of questions), which its authors "
    "give to researchers on request (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models), or the Parquet "
    "files of lmms-lab-encoder/MME"
)


def read_mme(folder: Path) -> list[BenchmarkQuestion]:
    """Return the questions of the ten perception sub-tasks."""
    files = parquet_files(folder, "test")
    questions = _read_parquet(files) if files else _read_tree(folder)
    pairs: dict[str, int] = defaultdict(int)
    for question in questions:
        pairs[question.unit] += 1
    if odd := sorted(unit for unit, number in pairs.items() if number != 2):
        raise PipelineError(
            f"{folder}: {pairs[odd[0]]} questions about {odd[0]}, where MME has two an image; use the published files"
        )
    return questions


def _read_parquet(files: Sequence[Path]) -> list[BenchmarkQuestion]:
    columns = ["question_id", "question", "answer", "category"]
    questions: list[BenchmarkQuestion] = []
    for row, place in parquet_rows(files, columns):
        where = str(place.path)
        name, text, answer, task = (text_of(row, column, where=where) for column in columns)
        if task in PERCEPTION:
            questions.append(_question(task, name, text, answer, place, where))
    return questions


def _read_tree(folder: Path) -> list[BenchmarkQuestion]:
    questions: list[BenchmarkQuestion] = []
    for task in PERCEPTION:
        place = find(folder, task)
        if place is None:
            raise MissingFile(f"{folder}: the sub-task {task}/ is missing; {GET}")
        images, texts = (
            (place / "images", place / "questions_answers_YN")
            if (place / "images").is_dir()
            else (place, place)
        )
        files = sorted(texts.glob("*.txt"))
        if not files:
            raise MissingFile(f"{texts}: no .txt file with questions; {GET}")
        for file in files:
            image = _image_beside(images, file.stem)
            questions += [
                _question(task, f"{task}/{image.path.name}", text, answer, image, str(file))
                for text, answer in _lines_of(file)
            ]
    return questions


def _image_beside(images: Path, stem: str) -> ImageFile:
    there = next((images / (stem + e) for e in ENDINGS if (images / (stem + e)).is_file()), None)
    if there is None:
        raise MissingFile(f"{images}: no image {stem} ({', '.join(ENDINGS)}); {GET}")
    return ImageFile(there)


def _lines_of(file: Path) -> list[tuple[str, str]]:
    """Return the questions and answers of a file, a tab between them."""
    try:
        rows = [line.strip().split("\t") for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        return [(question, answer) for question, answer in rows]
    except ValueError as error:
        raise PipelineError(
            f"{file}: not every line is a question, a tab and an answer ({reason_of(error)}); use the published file"
        ) from error


def _question(
    task: str, image_id: str, text: str, answer: str, place: ImagePlace, where: str
) -> BenchmarkQuestion:
    if (reference := answer.strip().lower()) not in ("yes", "no"):
        raise PipelineError(f"{where}: the answer {answer!r} is neither Yes nor No; use the published file")
    asked = text.replace(ITS_OWN_SUFFIX, "").strip()
    unit = image_id if image_id.startswith(f"{task}/") else f"{task}/{image_id}"
    return BenchmarkQuestion(
        f"{unit} {asked}", asked + SHORT_ANSWER, place, unit, reference, unit=unit, group=task
    )


def parsed(answer: str) -> str:
    """Return yes or no, or what stands in the first four characters of the answer; else 'other'."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


class MmeScorer:
    """The perception score, at most 2000: the sum over sub-tasks of accuracy and accuracy+, in percent."""

    def count(self, answered: Sequence[Answered]) -> list[Counted]:
        units: dict[str, list[Answered]] = defaultdict(list)
        for one in answered:
            units[one.question.unit].append(one)
        return [self._counted(pair) for pair in units.values()]

    def _counted(self, pair: Sequence[Answered]) -> Counted:
        task = pair[0].question.group
        right = sum(parsed(one.answer) == one.question.reference for one in pair)
        counts = {"right": right, "questions": len(pair), "right pairs": right == len(pair), "pairs": 1}
        return Counted(
            pair[0].question.image_id, {f"{task} {name}": float(n) for name, n in counts.items()}, task
        )

    def measures(self, totals: Totals) -> dict[str, np.ndarray]:
        tasks = [task for task in PERCEPTION if f"{task} pairs" in totals]
        scores = {
            task: 100 * ratio(totals[f"{task} right"], totals[f"{task} questions"])
            + 100 * ratio(totals[f"{task} right pairs"], totals[f"{task} pairs"])
            for task in tasks
        }
        return {"perception": np.sum(list(scores.values()), axis=0), **scores}


MME = Benchmark(
    name="mme",
    title="MME-P",
    folders=("mme", "MME"),
    split="perception, ten sub-tasks",
    licence="academic research only, says its page",
    source=GET,
    prompt=f'the question without "{ITS_OWN_SUFFIX}", and a line that asks for a single word or phrase',
    metric="perception score, of 2000",
    max_new_tokens=128,
    num_questions=(2_114,),
    read=read_mme,
    scorer=MmeScorer(),
    average_divisor=20.0,
)
