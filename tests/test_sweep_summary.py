"""The summary of a sweep: means, gains and gaps, against arithmetic on answers made by hand."""

from __future__ import annotations

import pytest

from pipeline.evaluation.compare import Answered
from pipeline.evaluation.predictions import Prediction, accuracy_by_type, by_test_set
from pipeline.sweep.lines import keep_teacher, write_line
from pipeline.sweep.summary import summarise_sweep, summary_tables


def answers(right: int, of: int = 10, *, test_set: str = "test") -> list[Prediction]:
    """One question an image, the first `right` of them answered well, half of them of each type."""
    return [
        Prediction(f"{n}", f"{n}", "shape" if n % 2 else "colour", "a", "a" if n < right else "b", test_set)
        for n in range(of)
    ]


@pytest.fixture
def sweep(tmp_path):
    """A folder of lines as a sweep leaves it, from (losses, seed) -> predictions."""

    def write(runs: dict[tuple[str, int], list[Prediction]]):
        lines = {}
        for (losses, seed), predictions in runs.items():
            sets = by_test_set(predictions)
            line = {
                "name": f"losses={losses},train.seed={seed}",
                "values": {"losses": losses, "train.seed": seed},
                "baseline": f"losses=none,train.seed={seed}",
                "identity": "0",
                "accuracy": {name: accuracy_by_type(of_set) for name, of_set in sets.items()},
            }
            answered = {name: Answered.of(of_set) for name, of_set in sets.items()}
            lines[line["name"]] = write_line(tmp_path, line, answered)
        return tmp_path, lines

    return write


def test_a_row_is_the_mean_of_its_seeds_and_its_gain_is_paired_by_seed(sweep):
    runs = {("none", 0): answers(4), ("all", 0): answers(8), ("none", 1): answers(6), ("all", 1): answers(6)}
    folder, lines = sweep(runs)
    keep_teacher(folder, answers(10))
    summary = summarise_sweep(folder, lines)
    none, everything = summary["rows"]
    assert (none["accuracy"], none["accuracy_by_seed"], none["gain"]) == (0.5, [0.4, 0.6], None)
    assert everything["accuracy"] == pytest.approx(0.7)
    assert everything["by_type"] == pytest.approx({"colour": 0.7, "shape": 0.7, "all": 0.7})
    gain = everything["gain"]
    assert gain["difference"] == pytest.approx(0.2)
    assert (gain["num_questions"], gain["num_images"], gain["num_seeds"]) == (10, 10, 2)
    # Of two seeds that gained 0.4 and nothing, Student's t knows little; the teacher is 0.5 above labels alone.
    assert gain["low"] < -1 and gain["high"] > 1
    assert everything["gap_closed"] == pytest.approx(0.2 / 0.5)
    assert everything["seeds"] == [0, 1]


def test_accuracy_and_gain_are_of_the_seeds_whose_baseline_is_done(sweep):
    folder, lines = sweep({("none", 0): answers(4), ("all", 0): answers(8), ("all", 1): answers(2)})
    _, everything = summarise_sweep(folder, lines)["rows"]
    assert everything["accuracy"] == pytest.approx(0.8) and everything["seeds"] == [0]
    assert everything["gain"]["difference"] == pytest.approx(0.4) and everything["gain"]["num_seeds"] == 1
    assert everything["gap_closed"] is None


def test_each_test_set_has_rows_and_a_table_of_its_own(sweep):
    def both(seen: int, unseen: int) -> list[Prediction]:
        return [*answers(seen), *answers(unseen, test_set="unseen")]

    folder, lines = sweep({("none", 0): both(4, 2), ("all", 0): both(8, 5)})
    keep_teacher(folder, answers(10))
    summary = summarise_sweep(folder, lines)
    rows = {(row["test_set"], row["label"]): row for row in summary["rows"]}
    assert rows["unseen", "losses=all"]["accuracy"] == 0.5
    assert rows["unseen", "losses=all"]["gap_closed"] is None  # the teacher did not answer these
    seen, unseen = summary_tables(summary).split("\n\n")
    assert seen.splitlines() == [
        "test set test: 10 questions of 10 images",
        "gain over labels alone, paired by question and seed; interval: bootstrap over images, one training seed, "
        "other seeds not covered",
        "variation    seeds  accuracy, %  gain, points      95% interval  gap closed, %",
        "-" * 78,
        "losses=none      1        40.00",
        "losses=all       1        80.00        +40.00  [+10.00, +70.00]             67",
        "teacher                  100.00",
    ]
    assert unseen.startswith("test set unseen: ") and "teacher" not in unseen


def test_a_teacher_that_is_no_better_than_labels_alone_leaves_no_gap_to_close(sweep):
    folder, lines = sweep({("none", 0): answers(8), ("all", 0): answers(9)})
    keep_teacher(folder, answers(8))
    summary = summarise_sweep(folder, lines)
    assert summary["rows"][1]["gap_closed"] is None


def test_a_teacher_that_answered_other_questions_is_left_out(sweep):
    folder, lines = sweep({("none", 0): answers(4), ("all", 0): answers(8)})
    keep_teacher(folder, answers(12, 12))
    summary = summarise_sweep(folder, lines)
    assert summary["teacher"] is None and summary["rows"][1]["gap_closed"] is None
