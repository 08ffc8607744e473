"""Progress of stage 1 and of an evaluation: counts on stderr while they run, nothing on stdout."""

from __future__ import annotations

import re

import pytest

from pipeline.data.shard_files import stored_bytes
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.readable import readable_bytes
from pipeline.teacher_cache.progress import Progress
from pipeline.teacher_cache.teacher import cache_teacher


def test_work_of_seconds_says_nothing_where_no_terminal_is(experiment, tmp_path, capfd):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store")
    cache_teacher(config)
    evaluate_model(str(experiment.student), config.data, config.evaluate, output=tmp_path / "p.jsonl")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "teacher-cache:" not in shown.err and "evaluate:" not in shown.err


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("pipeline.progress.can_redraw", lambda stream: True)


@pytest.mark.usefixtures("terminal")
def test_the_bar_ends_at_the_bytes_of_all_shards_with_what_was_done(experiment, tmp_path, capfd):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store")
    cache_teacher(config)
    shown = capfd.readouterr()
    said = " ".join(shown.err.split())
    size = readable_bytes(sum(stored_bytes(str(shard)) for shard in experiment.shards.glob("*.tar")))
    assert shown.out == ""
    assert f"teacher-cache: {size} of {size}, " in said and "part 3 of 3" in said
    assert re.search(r"[\d.]+ samples/s, 0 rejected, [\d.]+ kB written", said)


@pytest.mark.usefixtures("terminal")
def test_rejects_and_a_broken_shard_are_shown_too(experiment, tmp_path, capfd):
    overrides = [f"cache.path={tmp_path}/store", "data.max_length=60"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert run.rejected > 0
    assert f"{run.rejected} rejected" in " ".join(capfd.readouterr().err.split())


def test_a_line_of_stage_1_says_what_is_done_and_what_is_left(experiment):
    shards = [str(shard) for shard in sorted(experiment.shards.glob("*.tar"))]
    progress = Progress(shards, description="teacher-cache")
    progress.begin_shard(shards[0], num_samples=4)
    progress.advance(2)
    half = readable_bytes(stored_bytes(shards[0]) // 2)
    said = progress.line.text()
    assert said.startswith(f"{half} of ") and " left, " in said and said.endswith("part 0 of 3")
