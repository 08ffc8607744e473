"""Progress of stage 1: counts on stderr while it runs, nothing on stdout."""

from __future__ import annotations

import re

from pipeline.teacher_cache.teacher import cache_teacher


def test_the_bar_ends_at_the_bytes_of_all_shards_with_what_was_done(experiment, tmp_path, capfd):
    cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store"))
    shown = capfd.readouterr()
    last = re.split(r"[\r\n]", shown.err.strip())[-1]
    assert shown.out == ""
    assert last.startswith("teacher-cache: 100%") and "part 3/3" in last
    assert re.search(r"\d+ samples/s, 0 rejected, [\d.]+kB written", last)


def test_rejects_and_a_broken_shard_are_shown_too(experiment, tmp_path, capfd):
    overrides = [f"cache.path={tmp_path}/store", "data.max_length=60"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    last = re.split(r"[\r\n]", capfd.readouterr().err.strip())[-1]
    assert run.rejected > 0 and f"{run.rejected} rejected" in last
