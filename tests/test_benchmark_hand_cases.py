"""Answers whose scores were worked out by hand from the benchmarks' published rules, before the scorers saw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks.benchmark import Answered, BenchmarkQuestion
from pipeline.benchmarks.gqa import score_gqa
from pipeline.benchmarks.mmbench import MMBENCH, chosen
from pipeline.benchmarks.mme import MME
from pipeline.benchmarks.mme import parsed as yes_or_no
from pipeline.benchmarks.places import ImageFile
from pipeline.benchmarks.pope import POPE, says_no
from pipeline.benchmarks.scienceqa import parsed as letter
from pipeline.benchmarks.scores import score_of
from pipeline.benchmarks.vqa_answers import normalised, vqa_accuracy


def answered(name: str, said: str, truth: str, **fields: Any) -> Answered:
    fields = {"image_id": name} | fields
    return Answered(BenchmarkQuestion(name, "?", ImageFile(Path("none")), reference=truth, **fields), said)


@pytest.mark.parametrize(
    ("said", "truth", "score"),
    [
        *(("Left.", "left", 1), ("traffic light", "traffic light", 1), ("LEFT..", "left", 1)),
        *(("traffic  light", "traffic light", 0), ("Yes, left", "left", 0), (". left", "left", 0)),
        *(("left .", "left", 0), ("left?", "left", 0), ("on the left", "left", 0), ("lefts", "left", 0)),
    ],
)
def test_gqa(said, truth, score):
    assert score_gqa(answered("a", said, truth)) == score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("its", "its"), ("hes here", "he's here"), ("it's", "it 's"), ("let's go", "let 's go")),
        *(("Im", "im"), ("Ive", "ive")),  # the table has these in capitals; answers are in lower case
        *(("somebody'd", "somebodyd"), ("twas", "'twas"), ("yall", "y'all"), ("whove", "who've")),
        *(("couldnt've", "couldn't've"), ("shouldve", "should've")),
        *(("20%", "20%"), ("50,000 dollars", "50000 dollars"), ("$1,000.00", "$1000.00"), ("AT&T", "at&t")),
        *(("7 - eleven", "7 eleven"), ("7-eleven", "7 eleven"), ("ten-four", "10 4"), ("TWO,", "2")),
        *(("12.5.", "12.5"), ("a.m.", "am"), ("no.5", "no.5"), ("none.", "0"), ("...", "")),
        *(("a-b", "b"), ("an_apple", "apple"), ("the the", ""), ("x\ty", "x y")),
        *(('"coca cola"', "coca cola"), ('say "x" now', "say x now"), ("dog's-bed", "dog 's bed")),
        ("." * 33 + "x", ".x"),  # 32 full stops are removed, no more
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("said", "people", "expected"),
    [
        ("10", ["10", "ten", "Ten."] + ["9"] * 7, 0.9),
        ("cat", ["cat"] * 5 + ["dog"] * 5, 1.0),
        ("7-Eleven", ["7 eleven"] + ["7/eleven"] + ["711"] * 8, 0.6),
        ("", ["a"] * 10, 1.0),  # nothing is left of either
    ],
)
def test_vqa_accuracy(said, people, expected):
    assert vqa_accuracy(said, people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "is_no"),
    [
        *(
            ("no, there isn't", True),
            ("There is no dog", True),
            ("Yes, no", True),
            ("not.", True),
            (",no", True),
        ),
        *((". no", False), ("no;", False), ("No!", False), ("Nope", False), ('"no"', False)),
        *(("isn't", False), ("No-one", False), ("Yes. No", False)),
    ],
)
def test_pope(said, is_no):
    assert says_no(said) == is_no


def test_popes_splits_of_unequal_size_count_alike():
    cases = {
        "random": [("yes", "yes")],
        "popular": [("yes", "yes")] * 5 + [("no", "yes")] * 5,
        "adversarial": [("yes", "yes")] + [("yes", "no")] * 2,
    }
    rows = [
        answered(f"{split}{n}", said, truth, group=split)
        for split, pairs in cases.items()
        for n, (said, truth) in enumerate(pairs)
    ]
    # F1: 1; 2*5 / (2*5 + 5) = 2/3; 2*1 / (2*1 + 2) = 1/2. Accuracy: 1, 1/2, 1/3. Yes: 1, 1/2, 1.
    found = score_of(POPE, rows, num_all=14).measures
    assert found["F1"] == pytest.approx(100 * (1 + 2 / 3 + 1 / 2) / 3)
    assert found["accuracy"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3) / 3)
    assert found["yes"] == pytest.approx(100 * (1 + 1 / 2 + 1) / 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *(("YES", "yes"), ("Yes/no", "yes"), ("no yes", "no"), ("eyes", "yes"), ("know", "no")),
        *(("none", "no"), ("1 no", "no"), ("a yes", "other"), ("The answer is no", "other"), ("N", "other")),
    ],
)
def test_mme(said, expected):
    assert yes_or_no(said) == expected


def test_mme_counts_what_is_neither_as_wrong():
    said = {"posters": [("yes", "no"), ("yes", "?"), ("?", "?")], "color": [("no", "yes"), ("Yes.", "No.")]}
    rows = [
        answered(f"{task}{n}{truth}", one, truth, group=task, unit=f"{task}{n}", image_id=f"{task}{n}")
        for task, pairs in said.items()
        for n, pair in enumerate(pairs)
        for one, truth in zip(pair, ("yes", "no"), strict=True)
    ]
    # posters: 3 of 6 and 1 of 3 pairs; color: 2 of 4 and 1 of 2.
    found = score_of(MME, rows, num_all=10).measures
    assert found == pytest.approx({"perception": 50 + 100 / 3 + 100, "posters": 50 + 100 / 3, "color": 100})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *(("E", "E"), ("A. B", "A"), ("A. The answer is B.", "A"), ("The answer is Bob", "B")),
        *(("C.", "FAILED"), ("B .", "FAILED"), ("D: x", "FAILED"), ("F. x", "FAILED"), ("A, B", "FAILED")),
        *(("the answer is B.", "FAILED"), ("The answer is B\nso", "FAILED")),
        *(("The answer is A. The answer is A.", "FAILED"), ("The answer is F.", "F")),
    ],
)
def test_scienceqa(said, expected):
    assert letter(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *(("C: two birds", "C"), ("Answer: C", "C"), ("[B]", "B"), ("{B}", "B"), ("*B*", "B"), ("B)", "B")),
        *(("A cat", "A"), ("A dog", "A")),  # the article is taken for the letter, as published
        *(("B/C", "Z"), ("<B>", "Z"), ("'B'", "Z"), ("B-", "Z"), ("the dog", "Z"), ("E", "Z")),
        *(("I choose option B", "B"), ("option B is right because it barks", "Z")),
        *(("two birds", "C"), ("two birds, not a cat", "Z")),
        ("it seems to me that there are two birds there", "Z"),  # longer than twice the options
        *(("Cannot determine the answer. B", "Z"), ("I can't process this file. B", "Z")),
        ("I'm sorry, but without the image provided I say B", "Z"),
        ("Sorry, I can't help with images of people yet. B", "Z"),
    ],
)
def test_mmbench(said, expected):
    assert chosen(said, ("a cat", "a dog", "two birds")) == expected


def test_mmbench_needs_every_rotation():
    said = {"7": [(2_000_007, "D", "A"), (7, "A", "A"), (1_000_007, "B", "B")], "8": [(8, "A", "A")]}
    rows = [
        answered(str(n), one, truth, unit=unit, image_id=unit, options=("w", "x", "y", "z"))
        for unit, turns in said.items()
        for n, one, truth in turns
    ]
    assert score_of(MMBENCH, rows, num_all=4).measures == {
        "circular": 50, "vanilla": 100, "rows": 75, "rotations": 2,
    }  # fmt: skip


def test_an_interval_of_one_image_or_of_right_answers_alone_is_a_point():
    for rows in (
        [answered("1", "Yes", "A", options=("x", "y"))],
        [answered(str(n), "yes", "yes", group="random") for n in range(9)],
    ):
        found = score_of(POPE if rows[0].question.group else MMBENCH, rows, num_all=len(rows)).headline
        assert found.low == found.value == found.high
