"""--overwrite: what was trained is removed when the training in its place has made a step, and never its own input."""

# ruff: noqa: F811 - the fixture is imported

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_experiment import shard_members, write_shard
from test_training_folder import SAVING, kept, trained  # noqa: F401

from pipeline.errors import JoinError, PipelineError


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.optim=adamw_bnb_8bit"],
        ["train.adam_beta1=2"],
        ["train.lr_scheduler_type=cosine_with_restarts", 'train.lr_scheduler_kwargs={"bad": 1}'],
        ["train.fsdp=full_shard"],
        ["train.dataloader_num_workers=-1"],
    ],
)
def test_a_training_that_cannot_start_leaves_what_was_there(overrides, trained):
    run = trained(*SAVING)
    before = kept(run)
    with pytest.raises(PipelineError):
        trained(*SAVING, "train.seed=7", *overrides, overwrite=True)
    assert kept(run) == before


def test_nor_does_one_whose_first_step_fails(trained, experiment, tmp_path):
    shards = Path(shutil.copytree(experiment.shards, tmp_path / "shards"))
    run = trained(f"data.shards={shards}")
    before = kept(run)
    for shard in shards.glob("*.tar"):  # as long as before, so that only who reads an image sees it
        write_shard(
            shard, [(n, data[::-1] if n.endswith(".png") else data) for n, data in shard_members(shard)]
        )
    with pytest.raises(JoinError, match="has digest"):
        trained(f"data.shards={shards}", "train.seed=7", overwrite=True)
    assert kept(run) == before
