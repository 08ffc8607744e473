"""The bench of codecs on the small experiment: what it prints is of every choice, and moves as codecs must."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "codecs.py"


@pytest.fixture(scope="module")
def bench(experiment, tmp_path_factory):
    """The rows by target, choice and loss, and the table."""
    figures = tmp_path_factory.mktemp("bench") / "figures.json"
    process = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--config", str(experiment.file), "--json", str(figures)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = json.loads(figures.read_text())
    return {(row["target"], row["choice"], row["loss"]): row for row in rows}, process.stdout


@pytest.mark.parametrize(
    ("target", "loss", "powers"),
    [("attention", "attention", (-13, -12, -11, -10)), ("vision", "vision_all", (-8, -7, -6, -5, -4))],
)
def test_bytes_fall_and_errors_rise_along_the_steps(target, loss, powers, bench):
    ladder = [bench[0][target, f"fixed_point 2^{power}", loss] for power in powers]
    for finer, coarser in pairwise(ladder):
        assert coarser["bytes_per_sample"] < finer["bytes_per_sample"]
        assert (
            1.5 * finer["relative_rms_error"]
            < coarser["relative_rms_error"]
            < 2.7 * finer["relative_rms_error"]
        )
    assert ladder[0]["gradient"] < ladder[-1]["gradient"] < 0.01


def test_what_loses_nothing_has_no_error_and_takes_the_most(bench):
    for target, exact in (("attention", "float32"), ("vision", "float32"), ("logits", "whole vocabulary")):
        rows = [row for (of, *_), row in bench[0].items() if of == target]
        of_exact = [row for row in rows if row["choice"] == exact]
        assert of_exact and all(row["relative_rms_error"] == row["loss_error"] == 0 for row in of_exact)
        assert all(abs(row["gradient"]) < 1e-9 for row in of_exact)
        assert max(row["bytes_per_sample"] for row in rows) == of_exact[0]["bytes_per_sample"]


def test_more_of_the_top_and_more_draws_know_more_and_take_more(bench):
    def logits(choice: str) -> dict[str, float]:
        return bench[0]["logits", choice, "logits forward"]

    tops = [logits(f"top {k} + bucket") for k in (8, 16, 32, 50, 128)]
    for less, more in pairwise(tops):
        assert more["bytes_per_sample"] > less["bytes_per_sample"]
        assert (
            more["relative_rms_error"] < less["relative_rms_error"]
            and more["loss_error"] < less["loss_error"]
        )
    few, many = logits("top 8 + 16 draws"), logits("top 8 + 50 draws")
    assert tops[0]["bytes_per_sample"] < few["bytes_per_sample"] < many["bytes_per_sample"]
    assert many["gradient"] < few["gradient"]
    assert many["loss_error"] < tops[0]["loss_error"]  # a bucket sees less of a difference than there is


def test_every_choice_is_a_line_of_the_table(bench):
    rows, printed = bench
    heads = (
        "target",
        "stored as",
        "loss",
        "bytes a sample",
        "values",
        "loss error",
        "1 - cosine of gradient",
    )
    assert printed.splitlines()[0].split() == " ".join(heads).split()
    assert len(printed.splitlines()) == 1 + len(rows) == 1 + 7 + 8 + 10 + 6
