"""Published files in rarer shapes are read as the original reads them; what is broken is named in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmark_files import HUB, OFFICIAL, lines, mmbench_rows, put, table, write_mmbench
from small_experiment import picture

from pipeline.benchmarks.benchmark import BenchmarkQuestion
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.errors import PipelineError

TABLE = "mmbench_dev_en_20231003.tsv"
TURNS = [{"from": "human", "value": "Which?\nA. a\nB. b\n<image>"}, {"from": "gpt", "value": "B"}]


def read(name: str, data: Path) -> list[BenchmarkQuestion]:
    folder = BENCHMARKS[name].folder(data)
    assert folder is not None
    return BENCHMARKS[name].read(folder)


# MMBench's table


@pytest.mark.parametrize("option", ["Na", "nA", "Null", "N/a", "-", "0"])
def test_an_option_that_pandas_does_not_read_as_missing_is_an_option(option, tmp_path):
    rows = mmbench_rows()
    rows[0]["C"] = option
    write_mmbench(tmp_path, rows)
    assert read("mmbench", tmp_path)[0].options == ("red", "green", option)


@pytest.mark.parametrize("option", ["NA", "NULL", "null", "n/a", "#N/A N/A", "-1.#IND", "NONE", "Nan"])
def test_an_option_that_is_missing_ends_the_options(option, tmp_path):
    rows = mmbench_rows()
    rows[0]["C"] = option
    write_mmbench(tmp_path, rows)
    assert read("mmbench", tmp_path)[0].options == ("red", "green")


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c"])
def test_an_image_is_read_beside_a_text_with_a_separator_that_ends_no_line(mark, tmp_path):
    rows = mmbench_rows()
    rows[0]["hint"] = f"one{mark}two"
    write_mmbench(tmp_path, rows)
    first, second, *_ = read("mmbench", tmp_path)
    assert first.text.startswith(f"one{mark}two\nWhich colour?")
    assert first.image.read() == second.image.read() == picture(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\n\n",
        lambda text: text.replace(b"\n", b"\r\n"),
    ],
    ids=["byte order mark", "blank lines", "CRLF"],
)
def test_a_table_saved_by_another_program_is_the_same_table(change, tmp_path):
    file = write_mmbench(tmp_path) / TABLE
    asked = [question.text for question in read("mmbench", tmp_path)]
    file.write_bytes(change(file.read_bytes()))
    found = read("mmbench", tmp_path)
    assert [question.text.replace("\r\n", "\n") for question in found] == asked
    assert [question.image.read() for question in found] == [picture(n) for n in (1, 1, 1, 2, 2)]


def test_an_image_in_lines_of_base64_is_read(tmp_path):
    rows = mmbench_rows()
    rows[0]["image"] = rows[0]["image"][:76] + "\n" + rows[0]["image"][76:]
    write_mmbench(tmp_path, rows)
    assert read("mmbench", tmp_path)[0].image.read() == picture(1)


# LLaVA's files


def test_llavas_prompts_of_textvqa_are_asked_letter_by_letter(tmp_path):
    folder = OFFICIAL["textvqa"](tmp_path)
    data = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())
    data["data"][0]["question"] = "what does NASA's Logo say?"
    put(folder / "TextVQA_0.5.1_val.json", data)
    texts = [f"{row['question']}\nReference OCR token: X\nSay it. " for row in data["data"]]
    rows = [{"question_id": r["image_id"], "text": t} for r, t in zip(data["data"], texts, strict=True)]
    put(folder / "llava_textvqa_val_v051_ocr.jsonl", lines(rows))
    assert [question.text for question in read("textvqa", tmp_path)] == texts


@pytest.mark.parametrize("answer", ["B", "B.", "The answer is B."])
def test_scienceqa_as_llavas_script_converts_it(answer, tmp_path):
    folder = OFFICIAL["scienceqa"](tmp_path)
    row = {"id": "5", "image": "5/image.png", "conversations": [TURNS[0], {"from": "gpt", "value": answer}]}
    put(folder / "llava_test_CQM-A.json", [row, row | {"id": "6", "image": None}])
    [question] = read("scienceqa", tmp_path)
    assert question.reference == "B" and question.text.startswith("Which?\nA. a\nB. b\nAnswer with")


def test_a_byte_order_mark_is_no_part_of_mmes_question(tmp_path):
    folder = OFFICIAL["mme"](tmp_path)
    put(folder / "OCR" / "0001.txt", b"\xef\xbb\xbfIs it?\tYes\r\nIs it not?\tNo\r\n")
    assert "OCR/0001.jpg Is it?" in {question.id for question in read("mme", tmp_path)}


# The Hub's Parquet files


@pytest.mark.parametrize("name", HUB)
def test_a_split_of_which_a_file_is_missing_is_refused(name, tmp_path):
    for file in HUB[name](tmp_path).rglob("*.parquet"):
        file.rename(file.with_name(file.name.replace("of-00001", "of-00003").replace("of-00002", "of-00003")))
    with pytest.raises(
        PipelineError,
        match=r"-of-00003.parquet is missing, \d of 3 files are; download the rest of the split",
    ):
        read(name, tmp_path)


@pytest.mark.parametrize("name", ["pope", "mme", "mmbench", "textvqa"])
@pytest.mark.parametrize("split", ["train", "challenge"])
def test_the_only_file_is_not_taken_if_it_is_of_another_split(name, split, tmp_path):
    for file in HUB[name](tmp_path).rglob("*.parquet"):
        file.rename(file.with_name(f"{split}-00000-of-00001.parquet"))
    with pytest.raises(PipelineError, match="is missing; put"):
        read(name, tmp_path)


def test_the_only_file_may_have_a_name_of_its_own(tmp_path):
    [file] = HUB["pope"](tmp_path).rglob("*.parquet")
    file.rename(tmp_path / "pope" / "pope.parquet")
    assert len(read("pope", tmp_path)) == 6


def test_images_may_be_bytes_columns_in_any_order_and_others_beside_them(tmp_path):
    [file] = HUB["pope"](tmp_path).rglob("*.parquet")
    whole = pq.read_table(file)
    images = pa.array([row["bytes"] for row in whole["image"].to_pylist()], pa.large_binary())
    rest = whole.select(whole.schema.names[-2::-1]).append_column("extra", pa.array([1] * 6))
    pq.write_table(rest.add_column(0, "image", images), file)
    assert all(question.image.read() == picture(1) for question in read("pope", tmp_path))


NEEDED = {
    "gqa": ["id", "imageId", "question", "answer"],
    "scienceqa": ["question", "choices", "answer"],
    "textvqa": ["image_id", "question_id", "question", "answers", "ocr_tokens"],
    "pope": ["question", "answer", "image_source", "category"],
    "mme": ["question_id", "question", "answer", "category"],
    "mmbench": ["index", "question", "answer"],
}


@pytest.mark.parametrize(("name", "column"), [(name, column) for name in NEEDED for column in NEEDED[name]])
def test_an_empty_field_is_named(name, column, tmp_path):
    for file in HUB[name](tmp_path).rglob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        if column in rows[0] and (name, column, "image" in rows[0]) != ("gqa", "id", True):
            rows[0][column] = None
            pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(file)), file)
    with pytest.raises(PipelineError, match=r"holds nothing|None"):
        read(name, tmp_path)


@pytest.mark.parametrize("name", HUB)
def test_a_file_without_images_is_named_before_anything_is_asked(name, tmp_path):
    for file in HUB[name](tmp_path).rglob("*.parquet"):
        names = pq.read_schema(file).names
        pq.write_table(pq.read_table(file, columns=[n for n in names if n != "image"]), file)
    with pytest.raises(PipelineError, match="no column image, only "):
        read(name, tmp_path)


def test_an_image_that_is_a_path_alone_is_named(tmp_path):
    [file] = HUB["mme"](tmp_path).rglob("*.parquet")
    rows = pq.read_table(file).drop_columns("image").to_pylist()
    table(file, [row | {"image": {"bytes": None, "path": "1.png"}} for row in rows])
    with pytest.raises(PipelineError, match="row 0 of row group 0 has no image bytes"):
        read("mme", tmp_path)[0].image.read()


# JSON that is not the published one


def llava(**changed: Any) -> Callable[[Path], object]:
    row = {"id": "5", "image": "5/image.png", "conversations": TURNS} | changed
    return lambda folder: put(folder / "llava_test_CQM-A.json", [row])


def edited(file: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        put(folder / file, content)

    return edit


TEXTVQA, OCR = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "gqa",
        edited("testdev_balanced_questions.json", lambda x: x["201"].update(question=None)),
        "holds nothing",
    ),
    ("textvqa", edited(TEXTVQA, lambda x: x.update(data=3)), "'data' holds int"),
    (
        "textvqa",
        edited(TEXTVQA, lambda x: x["data"][0].update(answers="ten people")),
        "'answers' holds a text",
    ),
    ("textvqa", edited(OCR, lambda x: x["data"][0].update(ocr_tokens=None)), "'ocr_tokens' holds nothing"),
    ("scienceqa", edited("problems.json", lambda x: x["5"].update(choices=None)), "'choices' holds nothing"),
    ("scienceqa", edited("problems.json", lambda x: x.update({"5": [1]})), "no field 'image', only list"),
    ("scienceqa", llava(conversations=TURNS[:1]), "1 turns, no question with an answer"),
    ("scienceqa", llava(conversations=None), "'conversations' holds nothing"),
    ("scienceqa", llava(conversations=[{"value": None}, TURNS[1]]), "'value' holds nothing"),
    ("scienceqa", lambda folder: put(folder / "llava_test_CQM-A.json", [3]), "no field 'id', only int"),
    (
        "pope",
        lambda folder: put(folder / "coco" / "coco_pope_popular.json", ""),
        "popular.json holds no question",
    ),
    (
        "mmbench",
        lambda folder: write_mmbench(folder.parent, [mmbench_rows()[0] | {"index": "inf"}]),
        "no number",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "message"), BROKEN, ids=[f"{name}: {said}" for name, _, said in BROKEN]
)
def test_what_is_not_as_published_is_named(name, damage, message, tmp_path):
    damage(OFFICIAL[name](tmp_path))
    with pytest.raises(PipelineError, match=message):
        read(name, tmp_path)
