"""What a report has not measured is named in its page, and never made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from parsed_page import page_of
from small_store import write_store
from small_sweep import change, write_run, write_sweep, write_timed_store

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))


def test_without_a_teacher_the_gap_is_named_as_not_measured(sweep: Path):
    change(sweep / "summary.json", teacher=None)
    page = page_of(sweep)
    assert "Gap to the teacher closed - The teacher was not evaluated on these questions" in page.text
    assert "Gap closed is not shown: it needs a labels-only run and the teacher's answers." in page.text
    assert page.row("losses=all")[-1] == "-"
    assert page.row("losses=all", nth=1) == ["losses=all", "90.00", "85.00"]


def test_a_teacher_that_is_not_ahead_has_no_gap_to_close(sweep: Path):
    summary = json.loads((sweep / "summary.json").read_text())
    summary["teacher"]["test"] |= {"all": [0.69, 100], "colour": [0.752, 40]}
    change(sweep / "summary.json", **summary)
    page = page_of(sweep)
    assert "Gap to the teacher closed - The teacher is not ahead of labels only by half a point." in page.text
    assert page.row("losses=all", nth=1)[-2:] == ["-", "80"]


def test_curves_of_runs_that_are_gone_are_named_as_left_out(sweep: Path):
    shutil.rmtree(sweep / "runs" / "losses=all,train.seed=1")
    assert "1 of 6 runs are left out: their folders are gone." in page_of(sweep).text
    shutil.rmtree(sweep / "runs")
    text = page_of(sweep).text
    assert "No curves: the folders of all runs, which held the logs, are gone." in text
    assert "date not recorded" in text and "commit not recorded" in text
    assert (
        "Date, commit, command and versions are recorded in the runs' folders, and none of these is left."
        in text
    )


def test_gradient_shares_that_nobody_asked_for_are_named(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", store=tmp_path, gradient_shares=False)
    page = page_of(folder)
    assert "The share of the gradient norm was not logged: no run set log_gradient_shares: true." in page.text
    assert not [a for _, a in page.tags if "share of gradient" in a.get("aria-label", "")]


def test_variations_beyond_the_colours_are_named_and_not_drawn(tmp_path: Path):
    names = ("none", *(f"v{number}" for number in range(8)))
    text = page_of(write_sweep(tmp_path / "s", store=tmp_path, variations=names)).text
    assert "Not drawn, since only eight colours can be told apart: losses=v7." in text
    assert "one thin line for each of 16 runs" in text


def test_a_store_that_is_gone_or_does_not_know_its_time_is_named(sweep: Path, tmp_path: Path):
    store = tmp_path / "teacher.zarr"
    for record in store.glob("parts/*/part.json"):
        assert "seconds" in record.read_text()
    shutil.rmtree(store)
    text = page_of(sweep).text
    assert "Its cost is not known. The store cannot be read now: No teacher store at" in text
    assert "Teacher time saved - Not known: the store cannot be read." in text


def test_a_store_without_times_has_a_cost_and_no_saving(tmp_path: Path):
    text = page_of(write_sweep(tmp_path / "s", store=write_store(tmp_path / "old.zarr"))).text
    assert "not recorded: the version that made the store did not time its parts" in text
    assert "Teacher time saved: Not known: the store does not say how long the teacher took." in text


def test_a_run_alone_says_what_it_lacks(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": str(store)}})
    text = page_of(tmp_path / "run").text
    assert "Accuracy - Not measured: no held-out questions were answered." in text
    assert "Nothing was evaluated: this folder holds no answers to held-out questions." in text
    assert "Teacher time saved - No run here reads the teacher." in text
    assert 'Threads are "-" because only a sweep records them.' in text


def test_a_run_that_does_not_say_how_fast_it_was_is_named(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised", "logits"], config={"cache": {"path": str(store)}})
    state = tmp_path / "run" / "trainer_state.json"
    change(state, log_history=json.loads(state.read_text())["log_history"][:-1])
    page = page_of(tmp_path / "run")
    assert "Throughput - No run says how fast it trained." in page.text
    assert page.row("run") == ["run", "1", "-", "30", "-", "-", "-"]
    assert "Not known: not every run says how many samples it saw." in page.text


def test_a_run_that_answered_has_an_accuracy_and_no_gain(tmp_path: Path):
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": "nowhere"}})
    rest = {"group": "a", "question_type": "colour", "answer": "red", "correct": False, "test_set": "test"}
    answers = [{"key": str(n), "prediction": "red" if n else "blue", **rest} for n in range(4)]
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    page = page_of(tmp_path / "run")
    assert "Accuracy 75.00 % run, 4 questions of test. No gain: no labels-only run." in page.text
    assert page.row("run") == ["run", "1", "75.00"]
