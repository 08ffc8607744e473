"""`python -m bench.stage1`, `stage2` and `stub_load` with tiny models, and the turns that contestants take."""

from __future__ import annotations

import time
from functools import partial

import pytest

from bench import stage1, stage2, stub_load
from bench.models import MODELS, Case, write_model
from bench.turns import measure, print_turns

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    case = Case("tiny", 200, samples=2, batch_size=1, folder=tmp_path_factory.mktemp("bench"), workers=1)
    stage2.prepare(case)
    return case


@pytest.mark.parametrize("name", [name for name in stage1.CONTESTANTS if name != "compiled"])
def test_a_turn_of_stage_1(name: str, case: Case):
    stage1.CONTESTANTS[name](case)()


@pytest.mark.parametrize("name", stage2.CONTESTANTS)
def test_a_turn_of_stage_2(name: str, case: Case):
    counted = stage2.CONTESTANTS[name](case)()
    assert ("waiting" in counted) == (name == "loading")


def test_a_sample_has_about_as_many_positions_as_asked_for(case: Case):
    _, [(batch, [image]), _] = stage1.batches(case)
    assert batch["input_ids"].shape[1] == pytest.approx(case.tokens, rel=0.1)
    assert image["pixel_values"].shape == (1, 3, 336, 336)


def _sleeper(seconds: float):
    return lambda: time.sleep(seconds) or {"waiting": seconds}


def test_contestants_take_turns_and_ratios_are_to_the_first(capsys):
    turns = measure({"short": partial(_sleeper, 0.01), "long": partial(_sleeper, 0.1)}, repeats=2)
    print_turns(turns, against="short")
    printed = capsys.readouterr()
    order = [line.split(": ")[1] for line in printed.err.splitlines() if line.startswith("turn")]
    assert order == ["short", "long"] * 3
    assert len(turns["long"]) == 2 and all(0.1 <= turn.seconds < 5 for turn in turns["long"])
    assert all(turn.peak_bytes > 10**7 and turn.above_idle_bytes >= 0 for turn in turns["long"])
    assert "long: waiting for batches 10.0% of the time" in printed.out


def test_a_stub_loads_its_tensors_and_little_more(tmp_path):
    write_model(tmp_path / "teacher", MODELS["small", "teacher"], "float16")
    row = stub_load.row_of(tmp_path / "teacher")
    assert 0.9 < float(row["resident/needed"]) < 2 and float(row["needed"].split()[0]) > 10
