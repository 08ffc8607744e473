"""Readers of the benchmarks' published files: official forms and the Hub's Parquet give the same questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import benchmark_files
import pytest
from benchmark_files import HUB, OFFICIAL, mmbench_rows, put, write_mmbench
from small_experiment import picture

from pipeline.benchmarks import places
from pipeline.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from pipeline.benchmarks.mmbench import read_mmbench
from pipeline.benchmarks.places import TableImage
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.errors import PipelineError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read(name: str, data: Path) -> list[BenchmarkQuestion]:
    """Return the questions of a benchmark below `data`."""
    benchmark = BENCHMARKS[name]
    folder = benchmark.folder(data)
    assert folder is not None
    return benchmark.read(folder)


def texts(questions: list[BenchmarkQuestion]) -> dict[str, str]:
    return {question.id: question.text for question in questions}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_hubs_files_give_the_questions_of_the_official_ones(name, tmp_path):
    OFFICIAL[name](tmp_path / "official")
    HUB[name](tmp_path / "hub")
    ours, theirs = (read(name, tmp_path / form) for form in ("official", "hub"))

    def content(questions):
        return sorted((q.text, q.reference, q.group, q.options) for q in questions)

    assert content(ours) == content(theirs) and ours
    assert all(q.image.read().startswith(b"\x89PNG") for q in (*ours, *theirs))


def test_gqa_asks_for_a_word_and_keeps_questions_of_an_image_together(tmp_path):
    HUB["gqa"](tmp_path)
    questions = read("gqa", tmp_path)
    assert [q.image_id for q in questions] == ["n1", "n2", "n2"]
    assert texts(questions)["201"] == "Is it overcast?" + SHORT
    assert questions[0].image.read() == picture(1) and questions[1].image.read() == picture(2)


def test_scienceqa_takes_test_questions_with_an_image_and_writes_llavas_prompt(tmp_path):
    OFFICIAL["scienceqa"](tmp_path)
    assert texts(read("scienceqa", tmp_path)) == {
        "5": "Context: Look closely.\nWhich is it?\nA. one\nB. two" + LETTER,
        "9": "Which is it?\nA. red\nB. green\nC. blue" + LETTER,
    }


def test_llavas_own_file_of_scienceqa_is_read_as_it_is(tmp_path):
    folder = OFFICIAL["scienceqa"](tmp_path)
    turns = [
        {"from": "human", "value": "<image>\nContext: x\nWhich?\nA. a\nB. b"},
        {"from": "gpt", "value": "B"},
    ]
    rows = [
        {"id": "4", "conversations": turns},
        {"id": "5", "image": "5/image.png", "conversations": turns},
    ]
    put(folder / "llava_test_CQM-A.json", rows)
    [question] = read("scienceqa", tmp_path)
    assert (question.id, question.text) == ("5", "Context: x\nWhich?\nA. a\nB. b" + LETTER)
    assert question.reference == "B" and question.image.read() == picture(5)


def test_textvqa_is_asked_with_ocr_tokens_and_without_both_by_name(tmp_path):
    OFFICIAL["textvqa"](tmp_path)
    first, _, last = read("textvqa", tmp_path)
    assert first.text == "What brand is this?\nReference OCR token: DAKOTA, 1.5" + SHORT
    assert (
        last.text == "What time is it?\nReference OCR token: " + SHORT
    )  # none: the line stays, as published
    assert read("textvqa-no-ocr", tmp_path)[0].text == "What brand is this?" + SHORT
    assert BENCHMARKS["textvqa"].in_average and not BENCHMARKS["textvqa-no-ocr"].in_average


def test_textvqas_ocr_tokens_may_come_from_llavas_prompts(tmp_path):
    folder = OFFICIAL["textvqa"](tmp_path)
    rows = [
        {"question_id": q.image_id, "text": q.text.replace("DAKOTA", "OTHER")}
        for q in read("textvqa", tmp_path)
    ]
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    put(folder / "llava_textvqa_val_v051_ocr.jsonl", benchmark_files.lines(rows))
    assert "Reference OCR token: OTHER, 1.5\n" in read("textvqa", tmp_path)[0].text
    put(folder / "llava_textvqa_val_v051_ocr.jsonl", benchmark_files.lines(rows[:1]))
    with pytest.raises(PipelineError, match="no OCR tokens for the question 'what colour is it"):
        read("textvqa", tmp_path)


def test_pope_counts_questions_from_the_start_of_each_split(tmp_path):
    OFFICIAL["pope"](tmp_path)
    questions = read("pope", tmp_path)
    assert [q.id for q in questions[:3]] == ["random/0", "random/1", "popular/0"]
    assert questions[0].text == "Is there a snowboard in the image?" + SHORT
    assert {q.image_id for q in questions} == {"COCO_0.jpg", "COCO_1.jpg", "COCO_2.jpg"}


def test_mme_drops_its_own_suffix_and_pairs_the_questions_of_an_image(tmp_path):
    OFFICIAL["mme"](tmp_path)
    questions = read("mme", tmp_path)
    assert len(questions) == 20 and {q.unit for q in questions} == {q.image_id for q in questions}
    assert {q.text for q in questions} == {"Is it red?" + SHORT, "Is it a car?" + SHORT}
    put(tmp_path / "mme" / "OCR" / "0001.txt", "Is it red? Please answer yes or no.\tYes\n")
    with pytest.raises(PipelineError, match=r"1 questions about OCR/0001.jpg, where MME has two"):
        read("mme", tmp_path)


def test_mmbench_reads_quoted_fields_and_stops_at_the_first_missing_option(tmp_path):
    write_mmbench(tmp_path)
    first, second, third, fourth, _ = read("mmbench", tmp_path)
    assert first.text == 'A "hint"\nof two lines\nWhich colour?\nA. red\nB. green\nC. blue' + LETTER
    assert [q.reference for q in (first, second, third)] == ["B", "A", "C"]
    assert {q.unit for q in (first, second, third)} == {"241"} and fourth.unit == "252"
    assert fourth.text == "Is it?\nA. yes\nB. no" + LETTER
    assert first.image_id == third.image_id != fourth.image_id
    assert first.image.read() == picture(1) and fourth.image.read() == picture(2)


def test_an_option_that_pandas_reads_as_missing_ends_the_options(tmp_path):
    rows = mmbench_rows()[3:]
    rows[0] |= {"C": "None", "D": "something"}
    write_mmbench(tmp_path, rows)
    assert read("mmbench", tmp_path)[0].options == ("yes", "no")


def test_an_image_of_mmbench_may_be_that_of_another_row(tmp_path):
    rows = mmbench_rows()
    for row in rows[1:3]:
        row["image"] = "241"
    write_mmbench(tmp_path, rows)
    questions = read("mmbench", tmp_path)
    assert questions[2].image.read() == picture(1) and questions[2].image_id == questions[0].image_id


@pytest.mark.parametrize("name", BENCHMARKS)
def test_images_are_places_and_not_bytes(name, tmp_path):
    OFFICIAL[name.removesuffix("-no-ocr")](tmp_path)
    for question in read(name, tmp_path):
        assert not any(isinstance(getattr(question.image, slot), bytes) for slot in question.image.__slots__)


def test_the_rows_of_the_suite_are_complete():
    assert list(BENCHMARKS)[:6] == ["gqa", "scienceqa", "textvqa", "pope", "mme", "mmbench"]
    for benchmark in BENCHMARKS.values():
        assert isinstance(benchmark, Benchmark)
        assert all((benchmark.licence, benchmark.source, benchmark.split, benchmark.prompt, benchmark.metric))
        assert benchmark.max_new_tokens == (1024 if benchmark.name in ("scienceqa", "mmbench") else 128)
        assert benchmark.crops == (benchmark.name == "scienceqa")
        assert benchmark.average_divisor == (20 if benchmark.name == "mme" else 1)


# What is missing or damaged

MISSING = {
    "gqa": ["testdev_balanced_questions.json", "images", "images/n2.jpg"],
    "scienceqa": ["problems.json", "pid_splits.json", "images/test/9/image.png"],
    "textvqa": [
        "TextVQA_0.5.1_val.json",
        "TextVQA_Rosetta_OCR_v0.2_val.json",
        "train_images",
        "train_images/004b.jpg",
    ],
    "pope": ["coco/coco_pope_popular.json", "val2014", "val2014/COCO_2.jpg"],
    "mme": ["count", "scene/images/0001.jpg", "count/0001.txt"],
    "mmbench": ["mmbench_dev_en_20231003.tsv"],
}


@pytest.mark.parametrize(
    ("name", "file"), [(name, file) for name, files in MISSING.items() for file in files]
)
def test_a_missing_file_is_named_with_the_place_to_get_it(name, file, tmp_path):
    gone = OFFICIAL[name](tmp_path) / file
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(PipelineError) as refused:
        read(name, tmp_path)
    message = str(refused.value)
    # Of MME's images, the ending is not known.
    assert (
        Path(file).name.removesuffix(".txt" if name == "mme" else "").split(".jpg")[0] in message
        or "txt" in message
    )
    assert BENCHMARKS[name].source in message and "\n" not in message


BROKEN = {
    "gqa": ("testdev_balanced_questions.json", "cannot be read as JSON"),
    "scienceqa": ("problems.json", "cannot be read as JSON"),
    "textvqa": ("TextVQA_0.5.1_val.json", "cannot be read as JSON"),
    "pope": ("coco/coco_pope_random.json", "cannot be read as JSON lines"),
    "mme": ("OCR/0001.txt", "not every line is a question, a tab and an answer"),
    "mmbench": ("mmbench_dev_en_20231003.tsv", "no column A, B, answer"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("content", [b"{", b"what is it\n", b"[1]\n"])
def test_a_damaged_file_is_named(name, content, tmp_path):
    file, message = BROKEN[name]
    folder = OFFICIAL[name](tmp_path)
    put(folder / file, content)
    with pytest.raises(PipelineError) as refused:
        read(name, tmp_path)
    assert file in str(refused.value)
    if content == b"{":
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gqa", lambda rows: rows["201"].pop("answer"), "question 201: no field 'answer', only imageId, "),
        ("gqa", lambda rows: rows["201"].update(imageId="../n1"), "outside the folder"),
        ("scienceqa", lambda rows: rows["5"].update(answer=2), "answer 2 of 2 choices"),
        (
            "textvqa",
            lambda rows: rows["data"][1].update(answers=["2"]),
            "entry 1: 1 answers, where TextVQA has ten",
        ),
    ],
)
def test_an_annotation_that_is_not_the_published_one_is_named(name, change, message, tmp_path):
    folder = OFFICIAL[name](tmp_path)
    file = folder / MISSING[name][0]
    rows = json.loads(file.read_text())
    change(rows)
    put(file, rows)
    with pytest.raises(PipelineError, match=message):
        read(name, tmp_path)


def test_a_label_that_is_neither_yes_nor_no_is_refused(tmp_path):
    folder = OFFICIAL["pope"](tmp_path)
    row = {"image": "COCO_0.jpg", "text": "Is there a cat?", "label": "maybe"}
    put(folder / "coco" / "coco_pope_random.json", benchmark_files.lines([row]))
    with pytest.raises(PipelineError, match="line 1: label 'maybe' of 'random'"):
        read("pope", tmp_path)


def test_a_parquet_file_that_is_cut_off_or_another_is_named(tmp_path):
    [file] = HUB["pope"](tmp_path).rglob("*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(PipelineError, match=r"test-00000-of-00001.parquet cannot be read as Parquet"):
        read("pope", tmp_path)
    benchmark_files.table(file, [{"question": "?"}], images=[1])
    with pytest.raises(PipelineError, match="no column answer, category, image_source, only image, question"):
        read("pope", tmp_path)


def test_images_of_a_parquet_file_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "ROWS", 2)
    file = benchmark_files.table(tmp_path / "x.parquet", [{"id": n} for n in range(7)], images=range(7))
    benchmark_files.pq.write_table(benchmark_files.pq.read_table(file), file, row_group_size=5)
    for row in (0, 4, 1, 1, 6, 5, 3, 0):
        assert places.ParquetImage(file, row // 5, row % 5).read() == picture(row)


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    [file] = HUB["pope"](tmp_path).rglob("*.parquet")
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(len(whole) - 4 - 3000) + whole[-3000:])
    with pytest.raises(PipelineError, match=r"parquet cannot be read as Parquet \(.*\); download it again"):
        for question in read("pope", tmp_path):
            question.image.read()


def test_a_row_without_an_image_is_named(tmp_path):
    file = benchmark_files.table(tmp_path / "x.parquet", [{"image": None}, {"image": None}])
    with pytest.raises(PipelineError, match=r"x.parquet: row 1 of row group 0 has no image bytes"):
        places.ParquetImage(file, 0, 1).read()


def test_an_image_that_is_no_base64_is_named(tmp_path):
    rows = mmbench_rows()
    rows[0]["image"] = "&" * 100
    table = write_mmbench(tmp_path, rows) / "mmbench_dev_en_20231003.tsv"
    [first, *_] = read_mmbench(table.parent)
    assert isinstance(first.image, TableImage)
    with pytest.raises(PipelineError, match=r"the row at byte .* holds no base64 image"):
        first.image.read()
