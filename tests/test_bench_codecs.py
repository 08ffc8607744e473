"""`python -m bench.codecs` on the small experiment: every choice is measured, and figures move as codecs must."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bench.codecs import measure


@pytest.fixture(scope="module")
def rows(experiment, tmp_path_factory):
    """The rows by target, choice and loss."""
    config = experiment.config(tmp_path_factory.mktemp("bench"))
    found = list(measure(config, num_samples=16))
    assert len(found) == 7 + 8 + 10 + 6
    return {(row["target"], row["stored as"], row["loss"]): row for row in found}


@pytest.mark.parametrize(
    ("target", "loss", "powers"),
    [("attention", "attention", (-13, -12, -11, -10)), ("vision", "vision_all", (-8, -7, -6, -5, -4))],
)
def test_bytes_fall_and_errors_rise_along_the_steps(target, loss, powers, rows):
    ladder = [rows[target, f"fixed_point 2^{power}", loss] for power in powers]
    for finer, coarser in pairwise(ladder):
        assert coarser["bytes a sample"] < finer["bytes a sample"]
        assert 1.5 * finer["values"] < coarser["values"] < 2.7 * finer["values"]
    gradients = [row["1 - cosine of gradient"] for row in ladder]
    assert gradients[0] < gradients[-1] < 0.01


def test_what_loses_nothing_has_no_error_and_takes_the_most(rows):
    for target, exact in (("attention", "float32"), ("vision", "float32"), ("logits", "whole vocabulary")):
        of_target = [row for (of, *_), row in rows.items() if of == target]
        of_exact = [row for row in of_target if row["stored as"] == exact]
        assert of_exact and all(row["values"] == row["loss error"] == 0 for row in of_exact)
        assert all(row["1 - cosine of gradient"] < 1e-9 for row in of_exact)
        assert max(row["bytes a sample"] for row in of_target) == of_exact[0]["bytes a sample"]


def test_more_of_the_top_and_more_draws_know_more_and_take_more(rows):
    def logits(choice: str) -> dict[str, float]:
        return rows["logits", choice, "logits forward"]

    tops = [logits(f"top {k} + bucket") for k in (8, 16, 32, 50, 128)]
    for less, more in pairwise(tops):
        assert more["bytes a sample"] > less["bytes a sample"]
        assert more["values"] < less["values"] and more["loss error"] < less["loss error"]
    few, many = logits("top 8 + 16 draws"), logits("top 8 + 50 draws")
    assert tops[0]["bytes a sample"] < few["bytes a sample"] < many["bytes a sample"]
    assert many["1 - cosine of gradient"] < few["1 - cosine of gradient"]
    assert many["loss error"] < tops[0]["loss error"]  # a bucket sees less of a difference than there is
