"""POPE: is an object in the image? The headline is the mean F1 of the three splits, `yes` being positive."""

from __future__ import annotations

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
from pipeline.benchmarks.files import (
    find,
    found,
    image_file,
    parquet_files,
    parquet_rows,
    read_lines,
    text_of,
)
from pipeline.errors import PipelineError

SPLITS = ("random", "popular", "adversarial")
GET = (
    "put coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json there, from output/coco of "
    "github.com/AoiDragon/POPE (MIT), and COCO's val2014/, or the Parquet files of lmms-lab-encoder/POPE"
)


def read_pope(folder: Path) -> list[BenchmarkQuestion]:
    """Return the questions of all three splits."""
    files = parquet_files(folder, "test")
    if files and find(folder, "coco_pope_random.json") is None:
        return _read_parquet(files)
    images = found(folder, "val2014", get=GET)
    questions: list[BenchmarkQuestion] = []
    for split in SPLITS:
        file = found(folder, f"coco_pope_{split}.json", get=GET)
        if not (rows := read_lines(file)):
            raise PipelineError(f"{file} holds no question; download it again")
        for number, row in enumerate(rows):  # question_id begins anew in each split
            where = f"{file}, line {number + 1}"
            image, text, label = (text_of(row, n, where=where) for n in ("image", "text", "label"))
            place = image_file(images, image, get=GET)
            questions.append(_question(f"{split}/{number}", text, place, image, label, split, where))
    return questions


def _read_parquet(files: Sequence[Path]) -> list[BenchmarkQuestion]:
    columns = ["question", "answer", "image_source", "category"]
    questions: list[BenchmarkQuestion] = []
    for number, (row, place) in enumerate(parquet_rows(files, columns)):
        where = f"{place.path}, row {number}"
        text, label, image, split = (text_of(row, name, where=where) for name in columns)
        questions.append(_question(f"{split}/{number}", text.strip(), place, image, label, split, where))
    return questions


def _question(
    name: str, text: str, place: ImagePlace, image: str, label: str, split: str, where: str
) -> BenchmarkQuestion:
    if label.strip().lower() not in ("yes", "no") or split not in SPLITS:
        raise PipelineError(
            f"{where}: label {label!r} of {split!r}; a label is yes or no of {', '.join(SPLITS)}"
        )
    reference = label.strip().lower()
    return BenchmarkQuestion(name, text + SHORT_ANSWER, place, image, reference, group=split)


def says_no(answer: str) -> bool:
    """Return whether the first sentence of an answer holds the word No, no or not; any other answer means yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return bool({"No", "no", "not"} & set(words))


class PopeScorer:
    """F1, accuracy and the share of yes of each split, and their means."""

    def count(self, answered: Sequence[Answered]) -> list[Counted]:
        return [Counted(a.question.image_id, self._counts(a)) for a in answered]

    def _counts(self, answered: Answered) -> dict[str, float]:
        said, truth = not says_no(answered.answer), answered.question.reference == "yes"
        kind = ("TP" if truth else "FP") if said else ("FN" if truth else "TN")
        return {f"{answered.question.group} {kind}": 1}

    def measures(self, totals: Totals) -> dict[str, np.ndarray]:
        zero = np.zeros(())
        by_split = {
            split: _of_split(*(totals.get(f"{split} {kind}", zero) for kind in ("TP", "FP", "FN", "TN")))
            for split in SPLITS
        }
        asked = [split for split in SPLITS if np.any(by_split[split]["questions"])]
        means = {
            name: np.mean([by_split[split][name] for split in asked], axis=0)
            for name in ("F1", "accuracy", "yes")
        }
        of_each = {f"{split} {name}": by_split[split][name] for split in asked for name in means}
        return means | of_each


def _of_split(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> dict[str, np.ndarray]:
    """Return the measures of one split, in percent."""
    questions = np.asarray(tp + fp + fn + tn)
    return {
        "F1": 100 * ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": 100 * ratio(tp + tn, questions),
        "yes": 100 * ratio(tp + fp, questions),
        "questions": questions,
    }


POPE = Benchmark(
    name="pope",
    title="POPE",
    folders=("pope", "POPE"),
    split="random, popular and adversarial, of COCO val2014",
    licence="MIT; the images have the terms of COCO and Flickr",
    source=GET,
    prompt="the question, and a line that asks for a single word or phrase",
    metric="mean F1 of the three splits, %",
    max_new_tokens=128,
    num_questions=(8_910, 9_000),
    read=read_pope,
    scorer=PopeScorer(),
)
