"""Laws of growth on numbers of a known law, and the bench of growth at its quick size: `python bench/growth.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
try:
    from growth import PLANS, Sweep, described, result, sweeps
    from growth_work import Point
    from laws import error_at_the_largest, fit
    from side_by_side import Turns
finally:
    sys.path.remove(str(BENCH))

SIZES = (200, 400, 800, 1200, 1600)


def _costs(a: float, b: float, c: float) -> list[float]:
    return [a + b * size + c * size**2 for size in SIZES]


@pytest.mark.parametrize("law", [(0.01, 4e-4, 2e-7), (0.0, 4e-4, 2e-7), (0.5, 0.0, 1e-7), (2.0, 0.0, 0.0)])
def test_a_known_law_is_found_again_and_predicts_the_largest(law):
    found = fit(SIZES, _costs(*law), (0, 1, 2))
    assert found.coefficients == pytest.approx(law, rel=1e-6, abs=1e-12)
    assert found.residual < 1e-9 and found(2000) == pytest.approx(law[0] + law[1] * 2000 + law[2] * 2000**2)
    assert error_at_the_largest(SIZES, _costs(*law), (0, 1, 2)) == pytest.approx(0, abs=1e-9)


def test_no_coefficient_falls_below_zero():
    falling = [1.0, 0.9, 0.8, 0.7, 0.6]
    found = fit(SIZES, falling, (0, 1, 2))
    assert found.coefficients[1:] == (0, 0) and found.residual == pytest.approx(0.26, abs=0.05)


def test_a_law_that_bends_where_nothing_was_measured_is_told():
    """As when the largest size no longer fits a cache: all others say too little of it."""
    costs = _costs(0.01, 4e-4, 0)
    assert error_at_the_largest(SIZES, [*costs[:-1], 2 * costs[-1]], (0, 1, 2)) == pytest.approx(-0.5)


def test_relative_errors_let_the_small_sizes_count():
    costs = _costs(0.1, 1e-3, 0)
    found = fit(SIZES, [costs[0] * 1.1, *costs[1:]], (0, 1))
    assert abs(found(200) / costs[0] - 1) < 0.1 and found.residual < 0.1


def test_a_law_is_written_without_the_terms_that_it_lacks():
    assert fit(SIZES, _costs(0.25, 0, 2e-7), (0, 1, 2)).text("T", scale=1000) == "250 + 0.0002 T^2"


def test_a_point_comes_back_from_its_name():
    point = Point("loading", 300, 32, 4, workers=2)
    assert Point.parse(point.name) == point


def test_every_plan_has_enough_sizes_for_its_laws():
    for name in ("small", "full"):
        for sweep in sweeps(PLANS[name]):
            for _, powers in sweep.laws.values():
                assert len(sweep.points) - 1 >= len(powers), (name, sweep.name)
    assert len(PLANS["small"].tokens) >= 4 and len(PLANS["small"].samples) >= 3


def test_a_sweep_is_summed_up_by_medians_and_a_law_of_what_was_counted():
    points = tuple(Point("stage 1", tokens, 4, 4) for tokens in SIZES)
    turns = [
        Turns(point.name, (9.0, 4 * seconds, 0.0), {"samples": 4, "positions": size, "startup_cpu_seconds": 3},
              idle_bytes=1, peak_bytes=10**8)
        for point, size, seconds in zip(points, SIZES, _costs(0.01, 4e-4, 2e-7), strict=True)
    ]  # fmt: skip
    laws = {"seconds_a_sample": ("positions", (0, 1, 2))}
    found = result(Sweep("stage 1 against positions", "positions", points, laws), turns)
    law = found["laws"]["seconds_a_sample"]
    assert law["coefficients"] == pytest.approx((0.01, 4e-4, 2e-7))
    assert law["error_at_the_largest"] == pytest.approx(0, abs=1e-9)
    *_, last = described(found)
    assert last.startswith(
        "milliseconds a sample = 10 + 0.4 positions + 0.0002 positions^2; at most 0.0% off"
    )


def test_the_memory_of_a_join_is_measured_on_made_up_samples(tmp_path):
    """Of so few samples what does not grow with them counts as well: a row of theirs is of some 200 bytes."""
    output = tmp_path / "join.json"
    command = [sys.executable, str(BENCH / "growth.py"), "--join", "30000", "--output", str(output)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(output.read_text())["join"]
    assert found["samples"] == 30_000 and process.stdout.startswith("30,000 samples: joined in ")
    assert 100 < found["bytes_a_sample"] < 600 and found["worker_bytes_a_sample"] < 300


def test_the_quick_run_measures_both_stages_with_their_laws(tmp_path):
    output = tmp_path / "growth.json"
    command = [sys.executable, str(BENCH / "growth.py"), "--quick", "--output", str(output)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    record, plan = json.loads(output.read_text()), PLANS["tiny"]
    assert (record["size"] == "tiny" and "CPU" in record["machine"]) or "torch" in record["machine"]
    expected = [sweep for sweep in sweeps(plan) if sweep.points]
    assert [sweep["name"] for sweep in record["sweeps"]] == [sweep.name for sweep in expected]
    for found, sweep in zip(record["sweeps"], expected, strict=True):
        assert found["laws"].keys() == sweep.laws.keys() and sweep.name in process.stdout
        assert len(found["rows"]) == len(sweep.points)
        assert all(row["seconds_a_sample"] > 0 and row["peak_bytes"] > 10**8 for row in found["rows"])
    first = record["sweeps"][0]["rows"]
    assert [row["positions"] for row in first] == pytest.approx(plan.tokens, rel=0.05)
    assert first[1]["store_bytes_a_sample"] > first[0]["store_bytes_a_sample"]
    assert first[1]["text_rows"] - first[0]["text_rows"] == first[1]["positions"] - first[0]["positions"]
