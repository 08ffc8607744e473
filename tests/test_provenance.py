"""Where an output comes from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cache import StoreUnreachable, without_secrets
from pipeline.config.config import load_config
from pipeline.config.provenance import PACKAGES, git_commit, provenance, save_provenance
from pipeline.data.shard_names import expand_shards
from pipeline.distill.training.run_identity import settings_of_weights
from pipeline.errors import ShardError


def test_it_names_config_versions_commit_command_and_time(experiment, tmp_path):
    config = experiment.config(tmp_path)
    found = json.loads(json.dumps(provenance(config)))
    assert found["config"] == config.model_dump(mode="json")
    assert list(found["versions"]) == ["python", *PACKAGES] and all(found["versions"].values())
    assert "/" not in found["command"].split(" ")[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])


def test_the_commit_is_that_of_the_checkout_and_says_if_files_differ():
    root = Path(__file__).parent.parent
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert git_commit().removesuffix("+changes") == (asked.stdout.strip() if asked.returncode == 0 else "")


def test_the_saved_config_loads_to_the_same_experiment(experiment, tmp_path):
    config = experiment.config(tmp_path, "losses.attention.distance=mse", "train.adam_epsilon=1e-9")
    save_provenance(tmp_path / "run", config)
    assert load_config(tmp_path / "run" / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://h/a.tar?token=x/y.z&v=2#f", "https://h/a.tar?token=***&v=***#f"),
        ("no https://u:p@h:80/a-{0..2}.tar?sig=%2Fx: mend", "no https://***@h:80/a-{0..2}.tar?sig=***: mend"),
        ("pipe:curl -s 'https://h/a.tar?bare' | zcat", "pipe:curl -s 'https://h/a.tar?***' | zcat"),
        ('{"a": ["http://h/a?b=c", "http://h/é.tar?d=e,f"]}', '{"a": ["http://h/a?b=***", "http://h/é.tar?d=***"]}'),
        ("s3://lab/a-0?.tar, hf://datasets/u/n@main/a.tar", "s3://lab/a-0?.tar, hf://datasets/u/n@main/a.tar"),
        ("x = 3? /home/a?b=c", "x = 3? /home/a?b=c"),
    ],
)  # fmt: skip
def test_tokens_in_urls_are_masked(text, masked):
    assert without_secrets(text) == masked == without_secrets(masked)


def test_records_and_errors_keep_no_token(experiment, tmp_path, monkeypatch):
    url = "https://lab.example/s.tar?token=geheim"
    config = experiment.config(tmp_path, f"data.shards={url}")
    monkeypatch.setattr(sys, "argv", ["alignkd", "teacher-cache", f"data.shards={url}"])
    save_provenance(tmp_path / "run", config)
    assert "geheim" not in (tmp_path / "run" / "provenance.json").read_text()
    assert load_config(tmp_path / "run" / "config.yaml").data.shards == url
    assert "geheim" not in f"{ShardError(f'{url} is gone.')}{StoreUnreachable(url, f'403 of {url}')}"
    assert settings_of_weights(config) == settings_of_weights(
        experiment.config(tmp_path, f"data.shards={url}er")
    )
    with pytest.raises(ShardError, match=r"is masked as .*name the shards anew"):
        expand_shards(provenance(config)["config"]["data"]["shards"])
