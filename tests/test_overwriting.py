"""--overwrite: what was trained goes when the training in its place has made a step, and never its input."""

# ruff: noqa: F811 - the fixture is imported

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from refusals import closed, open_folder, without_rights
from small_experiment import shard_members, write_shard
from test_training_folder import RESUME, SAVING, kept, trained  # noqa: F401

from pipeline.distill.student import train_student
from pipeline.distill.training.processes import alone_in
from pipeline.errors import ConfigError, JoinError, PipelineError
from pipeline.evaluation.experiment import run_experiment
from pipeline.evaluation.scores import evaluate_checkpoint


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


# What a training reads is not removed


def test_a_training_does_not_remove_what_it_reads(trained, experiment, tmp_path):
    run = trained(*SAVING)
    linked = Path(shutil.copytree(experiment.student, tmp_path / "linked"))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(run / "model/model.safetensors")
    before = kept(run)
    for key, value in (
        ("student.model", run / "model"),
        ("student.model", run / "checkpoint-2"),
        ("student.model", linked),
        ("teacher.model", run / "model"),
        ("evaluate.shards", run / "checkpoint-2"),
    ):
        for overwrite in (False, True):
            told = (
                f"{key} {value} lies among the model and checkpoints of {run}, .*; give another output_dir$"
            )
            with pytest.raises(PipelineError, match=told):
                trained(*SAVING, "train.seed=7", f"{key}={value}", overwrite=overwrite)
    assert kept(run) == before
    trained(*SAVING, f"student.model={run}/model", folder="elsewhere")


def test_nor_is_a_store_or_a_shard_removed(trained, experiment, tmp_path):
    run = trained()
    for key, source in (("cache.path", experiment.store), ("data.shards", experiment.shards)):
        copy = shutil.copytree(source, run / "checkpoint-9")
        with pytest.raises(PipelineError, match=f"{key} {copy} lies among"):
            trained(f"{key}={copy}", "train.seed=7", overwrite=True)
        assert sorted(os.listdir(copy)) == sorted(os.listdir(source))
        shutil.rmtree(copy)


def test_the_checkpoint_to_resume_from_is_not_removed(trained):
    run = trained(*SAVING)
    (run / "finished.json").unlink()
    before = kept(run)
    with pytest.raises(
        ConfigError, match=r"checkpoint-2 was made with other .*: train\.seed.* would remove it"
    ):
        trained("train.seed=7", f"train.resume_from_checkpoint={run}/checkpoint-2", overwrite=True)
    assert kept(run) == before


def test_an_experiment_learns_that_before_its_first_training(experiment, tmp_path):
    student = shutil.copytree(experiment.student, tmp_path / "supervised" / "model")
    config = experiment.config(tmp_path, "baseline=true", f"student.model={student}")
    with pytest.raises(PipelineError, match=r"lies among the model and checkpoints of .*/supervised, "):
        run_experiment(config, say=lambda line: None)
    assert not (tmp_path / "align_kd").exists()


# What is there


def test_weights_without_a_mark_are_replaced_only_if_asked(trained):
    run = trained()
    (run / "finished.json").unlink()
    (run / "trainer_state.json").unlink()
    before = kept(run)
    for changes in ([], ["train.seed=7"]):
        with pytest.raises(
            PipelineError, match=r"model holds weights, and there is no finished\.json to .*or --overwrite"
        ):
            trained(*changes)
    assert kept(run) == before
    trained("train.seed=7", overwrite=True)
    assert kept(run)["model/model.safetensors"] != before["model/model.safetensors"]


def test_so_are_weights_that_no_training_wrote(trained, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "pytorch_model.bin").write_bytes(b"mine")
    with pytest.raises(PipelineError, match="model holds weights"):
        trained()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda model: (model / "model.safetensors").unlink(), r"no weights"),
        (lambda model: shutil.rmtree(model), r"config\.json: no such file"),
        (lambda model: (model / "config.json").unlink(), r"config\.json: no such file"),
        (lambda model: os.truncate(model / "model.safetensors", 100), r"not readable as weights"),
        (lambda model: os.truncate(model / "model.safetensors", 70_000), r"not readable as weights"),
        (lambda model: os.truncate(model / "model.safetensors", 0), r"not readable as weights"),
    ],
)
def test_a_finished_training_whose_model_is_gone_or_cut_is_trained_anew_if_asked(harm, said, trained):
    run = trained()
    good = (run / "model/model.safetensors").read_bytes()
    harm(run / "model")
    told = rf"finished, but its model cannot be used: .*{said}.*; restore it, give .* or --overwrite to train anew"
    with pytest.raises(PipelineError, match=told):
        trained()
    trained(overwrite=True)
    assert (run / "model/model.safetensors").read_bytes() == good


def test_its_last_checkpoint_restores_such_a_model(trained):
    run = trained(*SAVING)
    good = (run / "model/model.safetensors").read_bytes()
    (run / "model/model.safetensors").unlink()
    trained(*SAVING, RESUME)
    assert (run / "model/model.safetensors").read_bytes() == good
    assert (run / "checkpoint-2").is_dir()


# What is the same training


def test_a_default_that_is_written_out_is_no_other_setting(trained):
    run = trained(*SAVING)
    before = kept(run)
    written = [
        "train.seed=42",
        "train.weight_decay=0.0",
        "train.optim=adamw_torch_fused",
        "train.adam_beta1=0.9",
    ]
    trained(*SAVING, *written)
    assert kept(run) == before
    with pytest.raises(PipelineError, match=r"made with other settings: train\.seed: not set -> 7;"):
        trained(*SAVING, *written[1:], "train.seed=7")
    (run / "finished.json").unlink()
    trained(*SAVING, *written, RESUME)
    trained(*SAVING)


def test_a_moved_copy_is_no_other_store_student_or_shard(trained, experiment, tmp_path):
    run = trained(*SAVING)
    before = kept(run)
    copies = {
        "cache.path": experiment.store,
        "data.shards": experiment.shards,
        "student.model": experiment.student,
    }
    moved = [f"{key}={shutil.copytree(path, tmp_path / key)}" for key, path in copies.items()]
    trained(*SAVING, *moved)
    assert kept(run) == before
    (run / "finished.json").unlink()
    trained(*SAVING, *moved, RESUME)
    config = tmp_path / "student.model" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    with pytest.raises(PipelineError, match=r"other settings: student's config\.json: "):
        trained(*SAVING, *moved)


def test_answers_of_what_is_replaced_go_with_it(experiment, tmp_path):
    run = tmp_path / "run"
    config = experiment.config(tmp_path)
    model = train_student(config, run)
    evaluate_checkpoint(config, str(model), output=run / "predictions.jsonl")
    assert len(list(run.glob("predictions.*"))) == 2
    train_student(experiment.config(tmp_path, "train.seed=7"), run, overwrite=True)
    assert not list(run.glob("predictions.*"))


def test_a_folder_that_may_not_be_written_is_named():
    with open_folder() as folder:
        (folder / "run").mkdir()
        with closed(folder / "run", 0o700), without_rights():
            told = pytest.raises(PipelineError, match=r"run: cannot be written .*give this user the right")
            with told, alone_in(folder / "run"):
                pass
