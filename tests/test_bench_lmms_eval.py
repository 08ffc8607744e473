"""What `python -m bench.lmms_eval` writes and compares; lmms-eval itself runs in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.lmms_eval import TASKS, compare, rows_of, write_data, write_tasks
from pipeline.benchmarks.suite import BENCHMARKS


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    write_data(folder)
    return folder


def logged(task: str, answers: list[str], score: float) -> list[dict[str, Any]]:
    """What lmms-eval logs of these answers; POPE's metric holds its score."""
    metric = TASKS[task][-1]
    value = {"score": score} if task == "pope" else score
    return [{"filtered_resps": answer, metric: value} for answer in answers]


@pytest.mark.parametrize("task", TASKS)
def test_our_readers_read_the_questions_in_their_order(task, data):
    benchmark = BENCHMARKS[TASKS[task][0]]
    folder = benchmark.folder(data)
    assert folder is not None
    questions, rows = benchmark.read(folder), rows_of(task)
    assert len(questions) == len(rows) == 8
    for question, row in zip(questions, rows, strict=True):
        assert row["question"].lower() in question.text.lower()
        assert question.image.read() == row["image"]["bytes"]


def test_right_answers_score_and_other_answers_are_found(data):
    right = [row["answer"] for row in rows_of("pope")]
    assert set(right) == {"yes", "no"}
    rows = compare("pope", data, logged("pope", right, 1.0), right)
    assert all(row["equal"] and row["their score"] == row["our score"] == 1 for row in rows)
    wrong = ["no" if answer == "yes" else "yes" for answer in right]
    rows = compare("pope", data, logged("pope", right, 1.0), wrong)
    assert not any(row["equal"] or row["our score"] for row in rows)
    red = compare("textvqa_val", data, logged("textvqa_val", ["red"] * 8, 0.0), ["red"] * 8)
    assert [row["our score"] for row in red] == [1.0] + [0.0] * 7


def test_tasks_are_lmms_evals_own_with_another_path_and_length(data, tmp_path):
    for task in TASKS:
        file = tmp_path / "lmms_eval" / "tasks" / task.split("_")[0] / f"{task}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text("")
    write_tasks(tmp_path / "ours", data, tmp_path / "lmms_eval")
    for task, (ours, files, split, _) in TASKS.items():
        made = yaml.safe_load((tmp_path / "ours" / f"{task}_drawn.yaml").read_text())
        assert Path(made["include"]).name == f"{task}.yaml" and Path(made["include"]).is_file()
        assert list(Path(made["dataset_path"]).glob(f"{split}-*.parquet")) == list((data / files).iterdir())
        assert made["generation_kwargs"]["max_new_tokens"] == BENCHMARKS[ours].max_new_tokens
