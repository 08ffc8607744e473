"""Two models side by side: the bootstrap against arithmetic, and a table of accuracies."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered, Gain, accuracy_table, paired_gain
from pipeline.evaluation.predictions import NO_TYPE, Prediction

pytestmark = pytest.mark.slow


def gain_of(ours: list[list[Prediction]], theirs: list[list[Prediction]]) -> Gain:
    return paired_gain([Answered.of(run) for run in ours], [Answered.of(run) for run in theirs])


def predictions(correct: list[bool], groups: list[str] | None = None) -> list[Prediction]:
    groups = groups or [str(number) for number in range(len(correct))]
    return [
        Prediction(f"{number:05d}", group, "yes/no", "yes", "yes" if right else "no")
        for number, (right, group) in enumerate(zip(correct, groups, strict=True))
    ]


def test_the_interval_of_three_images_is_that_of_all_27_resamples():
    # Image a has two questions, one gained; b one, lost; c one, equal.
    ours = predictions([True, True, False, True], ["a", "a", "b", "c"])
    theirs = predictions([False, True, True, True], ["a", "a", "b", "c"])
    gain = gain_of([ours], [theirs])
    sums, sizes = {"a": 1, "b": -1, "c": 0}, {"a": 2, "b": 1, "c": 1}
    resamples = [
        sum(sums[image] for image in draw) / sum(sizes[image] for image in draw)
        for draw in product("abc", repeat=3)
    ]
    assert gain.difference == 0.0
    # 1/27 of the resamples are b alone, 1/27 a alone: both beyond 2.5%, so the ends are their means.
    assert (gain.low, gain.high) == (min(resamples), max(resamples)) == (-1.0, 0.5)
    assert (gain.num_questions, gain.num_images) == (4, 3)


def test_the_interval_of_many_single_questions_is_that_of_the_normal_distribution():
    random = np.random.default_rng(5)
    ours, theirs = random.random(4000) < 0.8, random.random(4000) < 0.75
    gain = gain_of([predictions(ours.tolist())], [predictions(theirs.tolist())])
    differences = ours.astype(float) - theirs
    error = differences.std() / np.sqrt(len(differences))
    assert gain.difference == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(gain.difference - 1.96 * error, abs=0.06 * error)
    assert gain.high == pytest.approx(gain.difference + 1.96 * error, abs=0.06 * error)


def test_questions_of_one_image_count_as_one_observation():
    random = np.random.default_rng(6)
    per_image = random.random(300) < 0.5
    alone = gain_of([predictions(per_image.tolist())], [predictions([False] * 300)])
    groups = [str(image) for image in range(300) for _ in range(10)]
    tenfold = gain_of(
        [predictions(np.repeat(per_image, 10).tolist(), groups)], [predictions([False] * 3000, groups)]
    )
    assert (tenfold.low, tenfold.high) == pytest.approx((alone.low, alone.high), abs=0.006)


def test_a_model_against_itself_gains_nothing():
    same = predictions([True, False, True])
    assert str(gain_of([same], [same])) == "+0.00 points, 95% interval [+0.00, +0.00]"


def test_the_same_seed_gives_the_same_interval():
    ours, theirs = predictions([True, False, True, True] * 9), predictions([False, True, True, False] * 9)
    assert gain_of([ours], [theirs]) == gain_of([ours], [theirs])


@pytest.mark.parametrize(("num_seeds", "student_t"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_where_images_are_alike_the_interval_is_students_t_over_the_seeds(num_seeds, student_t):
    """The 97.5% quantiles are those of printed tables; one seed of all gains, every question of it."""
    nothing = predictions([False] * 40)
    gain = gain_of([predictions([True] * 40), *[nothing] * (num_seeds - 1)], [nothing] * num_seeds)
    mean = 1 / num_seeds
    half = student_t * num_seeds**-0.5 / num_seeds**0.5  # a single 1 among zeros has the deviation n^-0.5
    assert gain.difference == pytest.approx(mean)
    assert (gain.low, gain.high) == pytest.approx((mean - half, mean + half), rel=0.15)
    assert (gain.num_questions, gain.num_images, gain.num_seeds) == (40, 40, num_seeds)


def test_the_interval_over_equal_seeds_is_that_of_one():
    ours, theirs = predictions([True, False, True, True] * 9), predictions([False, True, True, False] * 9)
    one, two = gain_of([ours], [theirs]), gain_of([ours, ours], [theirs, theirs])
    assert (two.low, two.high) == pytest.approx((one.low, one.high), abs=0.03)


def test_answers_of_another_test_set_are_not_compared():
    elsewhere = [replace(p, test_set="unseen") for p in predictions([True])]
    with pytest.raises(PipelineError, match="answered different questions"):
        gain_of([predictions([True])], [elsewhere])


def test_answers_to_other_questions_are_not_compared():
    with pytest.raises(
        PipelineError, match=r"answered different questions; evaluate both on the same shards"
    ):
        gain_of([predictions([True, True])], [predictions([True])])


def test_the_table_has_a_row_a_model_and_a_column_a_question_type():
    ours = [*predictions([True, False]), Prediction("c", "c", "colour", "red", "red")]
    theirs = [*predictions([True, True]), Prediction("c", "c", "colour", "red", "blue")]
    assert accuracy_table({"student": ours, "other one": theirs}).splitlines() == [
        "accuracy, %  colour  yes/no    all",
        "questions         1       2      3",
        "-" * 34,
        "student      100.00   50.00  66.67",
        "other one      0.00  100.00  66.67",
    ]


def test_questions_without_a_type_have_one_column():
    asked = [Prediction("a", "a", NO_TYPE, "red", "red"), Prediction("b", "b", NO_TYPE, "red", "blue")]
    assert accuracy_table({"student": asked}).splitlines()[0] == "accuracy, %    all"
