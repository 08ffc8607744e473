"""Scorers of the benchmarks, on cases worked out by hand and against recorded outputs of reference scorers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.benchmarks.benchmark import Answered, BenchmarkQuestion
from pipeline.benchmarks.gqa import score_gqa
from pipeline.benchmarks.mmbench import MMBENCH, chosen
from pipeline.benchmarks.mme import MME, PERCEPTION
from pipeline.benchmarks.mme import parsed as parsed_yes_or_no
from pipeline.benchmarks.places import ImageFile
from pipeline.benchmarks.pope import POPE, says_no
from pipeline.benchmarks.scienceqa import parsed
from pipeline.benchmarks.scores import score_of
from pipeline.benchmarks.vqa_answers import normalised, vqa_accuracy
from pipeline.resampling import resampled_totals

RECORDED = json.loads(
    (Path(__file__).parent / "fixtures" / "benchmark_scorers" / "recorded.json").read_text()
)


def answered(answer: str, reference: str, **fields) -> Answered:
    fields = {"id": f"{fields}{reference}", "image_id": "i"} | fields
    return Answered(
        BenchmarkQuestion(text="?", image=ImageFile(Path("none")), reference=reference, **fields), answer
    )


def measures(benchmark, answers: list[Answered]) -> dict[str, float]:
    return score_of(benchmark, answers, num_all=len(answers)).measures


# GQA


@pytest.mark.parametrize(
    ("answer", "score"),
    [("no", 1), ("No", 1), ("No.", 1), ("NO...", 1), ("no, it is not", 0), ("", 0), ("n.o", 0), ("no!", 0)],
)
def test_gqa_ignores_case_and_full_stops_at_the_end(answer, score):
    assert score_gqa(answered(answer, "no")) == score


# VQA accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("an apple a day", "apple day"),
        ("two men", "2 men"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("u.s.a.", "usa"),
        ("dont", "don't"),
        ("cant see", "can't see"),
        ("joe's", "joe 's"),
        ("e-mail", "e mail"),  # no space beside the mark: it becomes one
        ("e - mail", "e mail"),
        ("x; y-z", "x y z"),  # each mark by itself
        ("10:30", "10:30"),
        ("$5.00", "$5.00"),
        ("what?", "what"),
        ("(x)", "x"),
        ("a\nb", "b"),
        ("", ""),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_the_vqa_challenge_does(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "people", "expected"),
    [
        ("cat", ["cat"] * 10, 1.0),
        ("cat", ["dog"] * 10, 0.0),
        # Of ten people one gave it. Without that person nobody did; without another, one in three.
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        # Two: without one of them 1/3, twice; without another 2/3, eight times: 18/30.
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),
        # Three: without one of them 2/3, three times; without another 1, seven times.
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("The cat.", ["a Cat"] * 2 + ["cat"] * 2 + ["dog"] * 6, 1.0),
        ("2", ["two"] * 4 + ["three"] * 6, 1.0),
        ("", ["cat"] * 10, 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_person_out(answer, people, expected):
    assert vqa_accuracy(answer, people) == pytest.approx(expected)


# POPE


@pytest.mark.parametrize("answer", ["No", "no", "No, there is no dog", "It is not there.", "not really. Yes"])
def test_an_answer_with_no_or_not_in_its_first_sentence_is_no(answer):
    assert says_no(answer)


@pytest.mark.parametrize("answer", ["Yes", "yes. no", "NO", "nothing", "", "Maybe", "cannot", "No\nreally"])
def test_any_other_answer_is_yes(answer):
    assert not says_no(answer)


def pope(split: str, hits: int, false_alarms: int, misses: int, right_noes: int) -> list[Answered]:
    cases = [
        ("yes", "yes", hits),
        ("yes", "no", false_alarms),
        ("no", "yes", misses),
        ("no", "no", right_noes),
    ]
    return [
        answered(said, truth, group=split, id=f"{split}{said}{truth}{number}", image_id=str(number))
        for said, truth, times in cases
        for number in range(times)
    ]


def test_pope_is_the_mean_f1_of_the_three_splits():
    answers = [*pope("random", 3, 1, 1, 3), *pope("popular", 4, 0, 0, 4), *pope("adversarial", 1, 1, 3, 3)]
    found = measures(POPE, answers)
    # F1 = 2 TP / (2 TP + FP + FN): 6/8, 1, 2/6.
    assert [found[f"{split} F1"] for split in ("random", "popular", "adversarial")] == pytest.approx(
        [75, 100, 100 / 3]
    )
    assert next(iter(found)) == "F1" and found["F1"] == pytest.approx((75 + 100 + 100 / 3) / 3)
    assert found["random accuracy"] == 75 and found["adversarial yes"] == 25


def test_pope_without_any_yes_is_0_and_no_division_by_0():
    found = measures(POPE, pope("random", 0, 0, 4, 4))
    assert found["F1"] == 0 and found["accuracy"] == 50 and found["yes"] == 0


# MME


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("Yes", "yes"), ("no", "no"), ("Yes, it is", "yes"), ("No.", "no"), ("Not at all", "no")),
        *(("It is yes", "other"), ("", "other"), ("Church", "other"), ("y", "other"), ("  yes", "other")),
        *(("noyes", "no"), ("Snow", "no")),  # the first four characters hold it
    ],
)
def test_mme_reads_yes_or_no_in_the_first_four_characters(answer, expected):
    assert parsed_yes_or_no(answer) == expected


def mme(task: str, *pairs: tuple[str, str]) -> list[Answered]:
    return [
        answered(
            said,
            truth,
            group=task,
            unit=f"{task}/{number}",
            image_id=f"{task}/{number}",
            id=f"{task}{number}{truth}",
        )
        for number, pair in enumerate(pairs)
        for said, truth in zip(pair, ("yes", "no"), strict=True)
    ]


def test_mme_adds_accuracy_and_the_share_of_images_with_both_right():
    # count: 3 of 4 right, one of two pairs. OCR: 1 of 2 right, no pair. position: all.
    answers = [
        *mme("count", ("Yes", "No"), ("Yes", "Yes")),
        *mme("OCR", ("dog", "No")),
        *mme("position", ("yes", "no")),
    ]
    found = measures(MME, answers)
    assert found == pytest.approx({"perception": 375, "count": 125, "position": 200, "OCR": 50})
    assert next(iter(found)) == "perception"


def test_a_model_that_always_says_yes_scores_50_a_task_and_no_more():
    answers = [one for task in PERCEPTION for one in mme(task, ("Yes", "Yes"), ("Yes", "Yes"))]
    assert measures(MME, answers)["perception"] == 500


# ScienceQA


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("B", "B"), ("B. a map", "B"), ("The answer is B.", "B"), ("So: The answer is C, since", "C")),
        *(("B.", "FAILED"), ("(B)", "FAILED"), ("b", "FAILED"), ("", "FAILED"), ("F", "FAILED")),
        *(("The answer is B", "FAILED"), ("The answer is A. The answer is B.", "FAILED")),
    ],
)
def test_scienceqa_takes_a_letter_in_the_originals_forms_alone(answer, expected):
    assert parsed(answer) == expected


# MMBench

OPTIONS = ("a cat", "a dog", "two birds")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("B", "B"), ("B.", "B"), ("(B)", "B"), ("B. a dog", "B"), ("The answer is B.", "B")),
        ("Two birds.", "C"),  # the text in place of the letter
        ("I think it is a dog", "B"),
        ("a cat and a dog", "Z"),
        ("A or B", "Z"),
        ("D", "Z"),  # there is no fourth option
        ("", "Z"),
        ("b", "Z"),
        ("It is B because of the many things that are there", "Z"),  # too far from the end
        ("The answer is **B**, and not A", "B"),
        ("Z", "Z"),
    ],
)
def test_mmbench_finds_the_letter_or_the_text_of_one_option(answer, expected):
    assert chosen(answer, OPTIONS) == expected


def rotations(base: int, *said: str) -> list[Answered]:
    """Answers to the rotations of a question, right where they equal A, B, C in turn."""
    return [
        answered(
            answer,
            "ABC"[turn],
            id=str(turn * 1_000_000 + base),
            unit=str(base),
            image_id=str(base),
            options=OPTIONS,
        )
        for turn, answer in enumerate(said)
    ]


def test_a_question_of_mmbench_counts_if_all_its_rotations_are_right():
    answers = [*rotations(1, "A", "B", "C"), *rotations(2, "A", "B", "A"), *rotations(3, "B", "B", "C")]
    found = measures(MMBENCH, answers)
    assert found == pytest.approx({
        "circular": 100 / 3, "vanilla": 200 / 3, "rows": 700 / 9, "rotations": 3,
    })  # fmt: skip


def test_a_model_that_always_says_a_has_no_circular_score():
    found = measures(MMBENCH, rotations(1, "A", "A", "A"))
    assert (found["circular"], found["vanilla"]) == (0, 100)


def test_an_answer_that_repeats_the_right_text_is_right_in_every_rotation():
    turned = [("x ray", "y axis", "zebra"), ("y axis", "zebra", "x ray"), ("zebra", "x ray", "y axis")]
    answers = [
        answered("the zebra", "CBA"[n], id=str(n * 1_000_000), unit="0", options=options)
        for n, options in enumerate(turned)
    ]
    assert measures(MMBENCH, answers)["circular"] == 100


# Reference scorers, recorded


def test_normalisation_is_the_reference_scorers():
    assert {text: normalised(text) for text, _ in RECORDED["vqa_normalised"]} == dict(
        RECORDED["vqa_normalised"]
    )


def test_vqa_accuracy_is_the_reference_scorers():
    for answer, people, expected in RECORDED["vqa_accuracy"]:
        assert vqa_accuracy(answer, people) == pytest.approx(expected), (answer, people)


def test_the_choice_of_mmbench_is_vlmevalkits():
    for answer, options, expected in RECORDED["mmbench_chosen"]:
        assert chosen(answer, options) == expected, (answer, options)


def test_the_letter_of_scienceqa_is_llavas():
    for answer, expected in RECORDED["scienceqa_parsed"]:
        assert parsed(answer) == expected, answer


def test_pope_is_llavas():
    case = RECORDED["pope"]
    answers = [
        answered(answer, label, group="random", id=str(number))
        for number, (answer, label) in enumerate(zip(case["answers"], case["labels"], strict=True))
    ]
    found = measures(POPE, answers)
    assert [found[name] / 100 for name in ("F1", "accuracy", "yes")] == pytest.approx(
        [case[name] for name in ("F1", "accuracy", "yes")]
    )


# Intervals


def test_totals_are_resampled_within_strata_and_alike_for_two_models():
    rows = np.array([[1.0, 1], [0, 1], [5, 1]])
    strata = np.array(["a", "a", "b"])
    first = resampled_totals(rows, strata, seed=1)
    assert (first[:, 1] == 3).all()
    assert set(first[:, 0]) == {5, 6, 7}  # the only image of "b" is always drawn
    assert np.mean(first[:, 0] == 6) == pytest.approx(0.5, abs=0.03)
    assert np.array_equal(first, resampled_totals(rows, strata, seed=1))
    assert not np.array_equal(first, resampled_totals(rows, strata, seed=2))


def test_an_interval_is_wider_where_images_are_fewer():
    from pipeline.benchmarks.gqa import GQA

    answers = [answered("no", "no" if n < 100 else "yes", id=str(n)) for n in range(200)]
    intervals = []
    for images in (200, 20):
        placed = [
            Answered(
                BenchmarkQuestion(
                    one.question.id,
                    "?",
                    one.question.image,
                    str(number * images // 200),
                    one.question.reference,
                ),
                one.answer,
            )
            for number, one in enumerate(answers)
        ]
        intervals.append(score_of(GQA, placed, num_all=200).headline)
    many, few = intervals
    assert many.value == few.value == 50
    # A proportion of 200: 1.96 sqrt(0.25 / 200) = 6.9 points each way; of 20 images 21.9.
    assert many.high - many.low == pytest.approx(13.9, abs=1.0)
    assert few.high - few.low == pytest.approx(43.8, abs=6.0)
