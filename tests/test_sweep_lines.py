"""A sweep's lines: they come back as they were written, and damage is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered
from pipeline.sweep.lines import QUESTIONS, RUNS, read_answers, read_lines, write_line

LINE = {"name": "losses=all", "values": {"losses": "all"}, "identity": "0"}


def answered(correct: list[bool]) -> Answered:
    return Answered("digest", np.arange(len(correct)) // 2, np.array(correct, dtype=bool))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_answers_come_back_bit_for_bit(tmp_path_factory, correct: list[bool]):
    folder = tmp_path_factory.mktemp("lines")
    line = write_line(folder, LINE, {"test": answered(correct)})
    assert read_lines(folder) == [line]
    back = read_answers(folder, line)["test"]
    assert back.correct.tolist() == correct
    assert back.groups.tolist() == [n // 2 for n in range(len(correct))]


def test_questions_are_kept_once(tmp_path):
    for _ in range(3):
        write_line(tmp_path, LINE, {"test": answered([True, False, True])})
    assert json.loads((tmp_path / QUESTIONS).read_text()) == {
        "digest": {"test_set": "test", "groups": [0, 0, 1]}
    }
    assert len(read_lines(tmp_path)) == 1  # each took the place of the one before


def test_questions_that_are_gone_are_told(tmp_path):
    line = write_line(tmp_path, LINE, {"test": answered([True])})
    (tmp_path / QUESTIONS).unlink()
    with pytest.raises(
        PipelineError, match=r"questions\.json lacks the questions of losses=all; remove its line"
    ):
        read_answers(tmp_path, line)


def test_questions_that_are_no_json_are_told(tmp_path):
    line = write_line(tmp_path, LINE, {"test": answered([True])})
    (tmp_path / QUESTIONS).write_text("{")
    with pytest.raises(PipelineError, match=r"questions\.json is not JSON; remove it and runs\.jsonl"):
        read_answers(tmp_path, line)


@pytest.mark.parametrize("packed", ["no base64!", "YWJj", ""])
def test_answers_that_are_damaged_are_told(tmp_path, packed):
    line = write_line(tmp_path, LINE, {"test": answered([True] * 9)})
    line["answers"]["test"][1] = packed
    with pytest.raises(
        PipelineError, match=r"the answers of losses=all are damaged|another number of questions"
    ):
        read_answers(tmp_path, line)


def test_more_answers_than_questions_are_refused(tmp_path):
    line = write_line(tmp_path, LINE, {"test": answered([True] * 800)})
    questions = {"digest": {"test_set": "test", "groups": [0, 0, 1]}}
    (tmp_path / QUESTIONS).write_text(json.dumps(questions))
    with pytest.raises(PipelineError, match=r"losses=all answers another number of questions"):
        read_answers(tmp_path, line)


def test_a_folder_without_lines_has_none(tmp_path):
    assert read_lines(tmp_path) == [] and not (tmp_path / RUNS).exists()
