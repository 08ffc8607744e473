"""A folder that a report cannot be made of is told in one sentence, which names the file and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_sweep import write_run, write_sweep, write_timed_store

from pipeline.errors import PipelineError
from pipeline.report.gather import gather

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))


def test_a_folder_that_is_nothing_of_ours_is_one_sentence(tmp_path: Path):
    with pytest.raises(
        PipelineError, match=r"no sweep.json, no trainer_state.json .* give the folder of a finished"
    ):
        gather(tmp_path)
    with pytest.raises(PipelineError, match=r"nowhere: no such folder; give the folder"):
        gather(tmp_path / "nowhere")


def test_a_sweep_that_did_not_finish_is_told_to(sweep: Path):
    (sweep / "summary.json").unlink()
    with pytest.raises(
        PipelineError, match=r"summary.json is missing; run the command that writes it, to its end"
    ):
        gather(sweep)


def test_a_summary_of_runs_that_are_not_in_the_file_is_not_believed(sweep: Path):
    lines = (sweep / "runs.jsonl").read_text().splitlines()
    (sweep / "runs.jsonl").write_text("\n".join(lines[2:]) + "\n")
    with pytest.raises(
        PipelineError, match=r"summary.json has 'losses=all', .*runs.jsonl has no run of it; run `al"
    ):
        gather(sweep)
    (sweep / "runs.jsonl").unlink()
    with pytest.raises(PipelineError, match=r"runs.jsonl has no run of it"):
        gather(sweep)


def test_a_line_of_runs_that_is_none_is_named(sweep: Path):
    with open(sweep / "runs.jsonl", "a") as file:
        file.write('{"name": "losses=cu')
    with pytest.raises(PipelineError, match=r"runs.jsonl: line 7 is not a run; remove it to run it again"):
        gather(sweep)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"rows": [{"variation": {"losses": "all"}, "label": "x"}], "teacher": null}'),
        ("runs.jsonl", '{"name": "losses=all,train.seed=0", "identity": "0", "values": {"losses": "all"}}\n'),
        ("sweep.json", "{}"),
        ("runs/losses=all,train.seed=0/trainer_state.json", '{"log_history": [{"loss/x": 1}]}'),
        ("runs/losses=all,train.seed=0/provenance.json", "{}"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(sweep: Path, file: str, text: str):
    (sweep / file).write_text(text)
    with pytest.raises(
        PipelineError,
        match=rf"{file} is damaged, or another version wrote it: .*; take it from a copy, or remove",
    ):
        gather(sweep)


def test_a_run_without_its_provenance_is_told_apart_from_a_damaged_one(tmp_path: Path):
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": "nowhere"}})
    (tmp_path / "run" / "provenance.json").unlink()
    with pytest.raises(PipelineError, match=r"provenance.json is missing"):
        gather(tmp_path / "run")
