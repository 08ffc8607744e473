"""Where an output comes from."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from pipeline.config.config import load_config
from pipeline.config.provenance import PACKAGES, git_commit, provenance, save_provenance


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
