"""Scores of the suite: averages of whole published splits, paired differences, the paper's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.benchmarks.benchmark import Answered, BenchmarkQuestion
from pipeline.benchmarks.paper import PAPER
from pipeline.benchmarks.places import ImageFile
from pipeline.benchmarks.scores import AVERAGED, BenchmarkScore, SuiteScores, differences, score_of
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.benchmarks.table import suite_json, suite_text
from pipeline.errors import PipelineError

ROOT = Path(__file__).parent.parent


def question(name: str) -> BenchmarkQuestion:
    return BenchmarkQuestion(name, "?", ImageFile(Path("none")), name, "yes")


def made_score(
    name: str, right: list[bool], *, num_all: int | None = None, published: int | None = None
) -> BenchmarkScore:
    """A score of GQA's kind under the name of any benchmark: one question an image."""
    row = BENCHMARKS[name]
    benchmark = replace(BENCHMARKS["gqa"], name=name, title=row.title, average_divisor=row.average_divisor)
    benchmark = replace(benchmark, num_questions=(published or num_all or len(right),))
    answers = [Answered(question(str(n)), "yes" if hit else "no") for n, hit in enumerate(right)]
    return score_of(benchmark, answers, num_all=num_all or len(right))


def made_suite(model: str, rights: dict[str, int], of: int = 40) -> SuiteScores:
    return SuiteScores(
        model, {name: made_score(name, [n < k for n in range(of)]) for name, k in rights.items()}
    )


SIX = [row.name for row in AVERAGED]


def test_the_average_is_of_six_with_mme_over_20():
    assert SIX == ["gqa", "scienceqa", "textvqa", "pope", "mme", "mmbench"]
    suite = made_suite("a", dict(zip(SIX, (20, 30, 10, 40, 20, 0), strict=True)))
    # 50, 75, 25, 100, 50 / 20, 0
    assert suite.average is not None
    assert suite.average.value == pytest.approx((50 + 75 + 25 + 100 + 2.5 + 0) / 6)
    assert suite.average.low < suite.average.value < suite.average.high


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.name)
def test_the_published_averages_are_the_means_of_their_rows(row):
    mean = np.mean([row.scores[b.name] / b.average_divisor for b in AVERAGED])
    assert mean == pytest.approx(row.average, abs=0.1)


def test_the_page_shows_the_published_rows_as_they_are_printed():
    printed = suite_text([made_suite("a", {"gqa": 20})]).splitlines()[3:9]
    assert all(line.startswith("published: ") for line in printed) and len(printed) == len(PAPER)
    assert "\n".join(printed) in (ROOT / "docs" / "benchmarks.md").read_text()


def test_a_subset_has_no_average_and_says_what_is_missing():
    suite = made_suite("a", dict.fromkeys(SIX[:5], 20))
    assert suite.average is None and suite.missing == ["MMB-dev"]
    text = suite_text([suite])
    assert "no average: it is the mean of all six whole published splits; missing: MMB-dev" in text
    assert text.splitlines()[2].split()[-2:] == ["-", "-"]
    assert suite_json([suite])["models"]["a"]["average"] is None


def test_a_sample_is_marked_and_keeps_the_average_away():
    scores = dict(made_suite("a", dict.fromkeys(SIX, 20)).scores)
    scores["pope"] = made_score("pope", [True, False], num_all=8910)
    suite = SuiteScores("a", scores)
    assert suite.average is None and suite.missing == ["POPE (a sample)"]
    text = suite_text([suite])
    assert "50.0*" in text and "sample of 2 from 8,910" in text


def test_files_of_another_number_of_questions_keep_the_average_away():
    scores = dict(made_suite("a", dict.fromkeys(SIX, 20)).scores)
    for published in (39, 41):  # more than the published ones are not the split either
        scores["gqa"] = made_score("gqa", [True] * 40, published=published)
        suite = SuiteScores("a", scores)
        assert suite_text([suite]).splitlines()[2].split()[:3] == ["a", "100.0*", "50.0"]
        assert suite.average is None and suite.missing == ["GQA (not the published split)"]
        assert "average" not in differences(suite, suite)
        notes = suite_text([suite]).splitlines()
        assert f"GQA: 40 questions in these files, {published} are published" in notes
        assert (
            "no average: it is the mean of all six whole published splits; missing: GQA (not the published split)"
            in notes
        )


def test_the_difference_of_two_models_is_paired():
    ours, theirs = [n % 2 == 0 for n in range(100)], [n % 2 == 0 or n == 1 for n in range(100)]
    a, b = (
        SuiteScores("a", {"gqa": made_score("gqa", ours)}),
        SuiteScores("b", {"gqa": made_score("gqa", theirs)}),
    )
    found = differences(b, a)["gqa"]
    # One question of a hundred differs: the paired interval is that of a share of 1%, and not of 50%.
    assert found.value == pytest.approx(1) and found.low == 0 and found.high < 4
    assert a.scores["gqa"].headline.high - a.scores["gqa"].headline.low > 15
    assert list(differences(a, b)) == ["gqa"]


def test_the_average_of_two_models_is_compared_too():
    a, b = made_suite("a", dict.fromkeys(SIX, 20)), made_suite("b", dict.fromkeys(SIX, 30))
    found = differences(a, b)
    assert list(found) == [*SIX, "average"]
    assert found["average"].value == pytest.approx(-(25 * 5 + 25 / 20) / 6)
    assert found["average"].low < found["average"].value < found["average"].high < 0


def test_models_that_answered_other_questions_are_not_compared():
    a, b = made_suite("a", {"gqa": 3}), made_suite("b", {"gqa": 3}, of=41)
    with pytest.raises(PipelineError, match="gqa: the two models answered different questions"):
        differences(a, b)
