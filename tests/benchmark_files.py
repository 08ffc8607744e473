"""Small files of each benchmark in its published forms, made by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_experiment import picture

from pipeline.benchmarks.mme import PERCEPTION

PEOPLE = ["red"] * 7 + ["the Red."] * 2 + ["blue"]


def put(path: Path, content: bytes | str | Any) -> Path:
    """Write bytes, text or JSON, with the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_gqa(data: Path) -> Path:
    folder = data / "gqa"
    questions = {
        "201": {"imageId": "n1", "question": "Is it overcast?", "answer": "no", "isBalanced": True},
        "202": {"imageId": "n2", "question": "Who is there?", "answer": "man"},
        "203": {"imageId": "n1", "question": "What colour is it?", "answer": "red"},
    }
    put(folder / "testdev_balanced_questions.json", questions)
    for number in (1, 2):
        put(folder / "images" / f"n{number}.jpg", picture(number))
    return folder


def write_scienceqa(data: Path) -> Path:
    folder = data / "scienceqa"
    with_image = {
        "question": "Which is it?",
        "choices": ["one", "two"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
    }
    put(
        folder / "problems.json",
        {
            "4": with_image | {"image": None},
            "5": with_image | {"hint": "Look closely."},
            "9": with_image | {"choices": ["red", "green", "blue"], "answer": 0},
            "7": with_image,
        },
    )
    put(folder / "pid_splits.json", {"train": ["7"], "test": ["4", "5", "9"]})
    for number in (5, 9):
        put(folder / "images" / "test" / str(number) / "image.png", picture(number))
    return folder


def write_textvqa(data: Path) -> Path:
    folder = data / "textvqa"
    rows = [
        {"question_id": 34602, "image_id": "003a", "question": "what brand is this?", "answers": PEOPLE},
        {"question_id": 34603, "image_id": "003a", "question": "what colour is it?", "answers": ["2"] * 10},
        {"question_id": 34604, "image_id": "004b", "question": "What time is it?", "answers": ["a"] * 10},
    ]
    put(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    ocr = [{"image_id": "003a", "ocr_tokens": ["DAKOTA", "1.5"]}, {"image_id": "004b", "ocr_tokens": []}]
    put(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": ocr})
    for number, name in enumerate(("003a", "004b")):
        put(folder / "train_images" / f"{name}.jpg", picture(number))
    return folder


def write_pope(data: Path) -> Path:
    folder = data / "pope"
    for number, split in enumerate(("random", "popular", "adversarial")):
        rows = [
            {
                "question_id": 1,
                "image": "COCO_1.jpg",
                "text": "Is there a snowboard in the image?",
                "label": "yes",
            },
            {
                "question_id": 2,
                "image": f"COCO_{number}.jpg",
                "text": "Is there a car in the image?",
                "label": "no",
            },
        ]
        put(folder / "coco" / f"coco_pope_{split}.json", lines(rows))
        put(folder / "val2014" / f"COCO_{number}.jpg", picture(number))
    return folder


def write_mme(data: Path) -> Path:
    folder = data / "mme"
    for number, task in enumerate(PERCEPTION):
        is_nested = task in ("artwork", "landmark", "scene", "posters", "celebrity")
        texts = folder / task / ("questions_answers_YN" if is_nested else ".")
        images = folder / task / ("images" if is_nested else ".")
        put(
            texts / "0001.txt",
            "Is it red? Please answer yes or no.\tYes\nIs it a car?  Please answer yes or no.\tNo\n",
        )
        put(images / "0001.jpg", picture(number))
    return folder


MMBENCH_COLUMNS = [
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"),
    *("l2-category", "comment", "split"),
]


def mmbench_rows() -> list[dict[str, Any]]:
    """Two questions with their rotations: one of three options with a hint of two lines, one of two."""
    hint, options = 'A "hint"\nof two lines', ["red", "green", "blue"]
    rows = []
    for turn in range(3):
        turned = options[turn:] + options[:turn]
        rows.append(
            _mmbench_row(turn * 1_000_000 + 241, "Which colour?", hint, turned, turned.index("green"), 1)
        )
    for turn in range(2):
        turned = ["yes", "no"][turn:] + ["yes", "no"][:turn]
        rows.append(_mmbench_row(turn * 1_000_000 + 252, "Is it?", "", turned, turned.index("yes"), 2))
    return rows


def _mmbench_row(
    index: int, question: str, hint: str, options: list[str], right: int, image: int
) -> dict[str, Any]:
    cells = dict(zip("ABCD", [*options, "", ""], strict=False))
    image_text = base64.b64encode(picture(image)).decode()
    named = {"index": index, "question": question, "hint": hint, "answer": "ABCD"[right], "image": image_text}
    return {name: "" for name in MMBENCH_COLUMNS} | cells | named


def write_mmbench(data: Path, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    folder = data / "mmbench"
    text = io.StringIO()
    writer = csv.DictWriter(text, MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(mmbench_rows() if rows is None else rows)
    put(folder / "mmbench_dev_en_20231003.tsv", text.getvalue())
    return folder


OFFICIAL = {
    "gqa": write_gqa,
    "scienceqa": write_scienceqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "mmbench": write_mmbench,
}


def write_all(data: Path) -> Path:
    """Write all six benchmarks in their official forms."""
    for write in OFFICIAL.values():
        write(data)
    return data


# The Hub's Parquet files


def table(path: Path, rows: Sequence[dict[str, Any]], *, images: Sequence[int] | None = None) -> Path:
    """Write rows, with pictures in a column `image` as the Hub has them, two rows a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pa.Table.from_pylist(list(rows))
    if images is not None:
        structs = [{"bytes": picture(number), "path": f"{number}.png"} for number in images]
        whole = whole.append_column("image", pa.array(structs))
    pq.write_table(whole, path, row_group_size=2)
    return path


def hub_gqa(data: Path) -> Path:
    folder = data / "gqa"
    rows = [
        {"id": "202", "imageId": "n2", "question": "Who is there?", "answer": "man"},
        {"id": "201", "imageId": "n1", "question": "Is it overcast?", "answer": "no"},
        {"id": "203", "imageId": "n2", "question": "What colour is it?", "answer": "red"},
    ]
    table(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    ids = [{"id": "n1"}, {"id": "n2"}, {"id": "n3"}]
    table(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", ids, images=[1, 2, 3])
    # The whole data set has all questions of the split as well.
    table(folder / "testdev_all_instructions" / "testdev-00000-of-00001.parquet", rows)
    return folder


def hub_scienceqa(data: Path) -> Path:
    folder = data / "scienceqa"
    rows = [
        {"question": "Which is it?", "choices": ["one", "two"], "answer": 1, "hint": "Look closely."},
        {"question": "Which is it?", "choices": ["red", "green", "blue"], "answer": 0, "hint": ""},
    ]
    table(folder / "ScienceQA-IMG" / "test-00000-of-00001.parquet", rows, images=[5, 9])
    table(folder / "ScienceQA-IMG" / "train-00000-of-00001.parquet", rows, images=[1, 2])
    table(folder / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows * 2, images=[5, 9, 1, 2])
    return folder


def hub_textvqa(data: Path) -> Path:
    folder = data / "textvqa"
    named = {"image_id": "003a", "answers": PEOPLE, "ocr_tokens": ["DAKOTA", "1.5"]}
    rows = [
        named | {"question_id": 34602, "question": "what brand is this?"},
        named | {"question_id": 34603, "question": "what colour is it?", "answers": ["2"] * 10},
        named
        | {"question_id": 34604, "image_id": "004b", "question": "What time is it?"}
        | {"ocr_tokens": [], "answers": ["a"] * 10},
    ]
    table(folder / "data" / "validation-00000-of-00002.parquet", rows[:2], images=[0, 0])
    table(folder / "data" / "validation-00001-of-00002.parquet", rows[2:], images=[1])
    return folder


def hub_pope(data: Path) -> Path:
    rows = [
        {
            "question_id": str(number),
            "question": f"Is there a {thing} in the image?",
            "answer": answer,
            "image_source": "COCO_1",
            "category": split,
        }
        for split in ("adversarial", "popular", "random")
        for number, (thing, answer) in enumerate((("snowboard", "yes"), ("car", "no")))
    ]
    table(data / "pope" / "data" / "test-00000-of-00001.parquet", rows, images=[1] * 6)
    return data / "pope"


def hub_mme(data: Path) -> Path:
    rows = [
        {
            "question_id": f"{task}/0001.png",
            "question": f"{question} Please answer yes or no.",
            "answer": answer,
            "category": task,
        }
        for task in (*PERCEPTION, "code_reasoning")
        for question, answer in (("Is it red?", "Yes"), ("Is it a car?", "No"))
    ]
    table(data / "mme" / "data" / "test-00000-of-00001.parquet", rows, images=range(22))
    return data / "mme"


def hub_mmbench(data: Path) -> Path:
    rows = [
        {
            name: (None if value == "" else value)
            for name, value in row.items()
            if name not in ("image", "l2-category")
        }
        for row in mmbench_rows()
    ]
    for row in rows:
        row["hint"] = row["hint"] or "nan"
    table(data / "mmbench" / "en" / "dev-00000-of-00001.parquet", rows, images=[1, 1, 1, 2, 2])
    return data / "mmbench"


HUB = {
    "gqa": hub_gqa,
    "scienceqa": hub_scienceqa,
    "textvqa": hub_textvqa,
    "pope": hub_pope,
    "mme": hub_mme,
    "mmbench": hub_mmbench,
}
