"""Shards on the Hub (`hf://`): both stages by command line, on a stand-in, give what they give of the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from servers import hub_server
from small_experiment import Experiment, losses_of_steps

from cache import summarise
from pipeline.distill.student import train_student

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHARDS = "hf://datasets/lab/store/shards/shard-{000000..000002}.tar"


def test_the_hub_gives_the_store_and_the_losses_of_the_disk(experiment: Experiment, tmp_path: Path):
    files = {f"shards/{file.name}": file.read_bytes() for file in sorted(experiment.shards.glob("*.tar"))}
    assert len(files) == 3
    config = experiment.config(
        tmp_path,
        f"data.shards={SHARDS!r}",
        f"cache.path={tmp_path}/teacher.zarr",
        f"data.mirror={tmp_path}/mirror",
        "evaluate=null",
        "baseline=false",
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with hub_server(files) as (address, _):
        # huggingface_hub takes its address when it is imported, hence another process.
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_testing", "HF_HUB_OFFLINE": "0"}
        for command in ("teacher-cache", "distill"):
            done = subprocess.run(
                [sys.executable, "cli.py", command, "--config", str(tmp_path / "config.yaml")],
                env=environment,
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            assert done.returncode == 0, done.stderr[-3000:]
    assert summarise(tmp_path / "teacher.zarr").content == summarise(experiment.store).content
    here = experiment.config(tmp_path / "disk", f"cache.path={experiment.store}")
    train_student(here, tmp_path / "disk" / "run")
    assert losses_of_steps(Path(config.output_dir) / "align_kd") == losses_of_steps(tmp_path / "disk" / "run")
