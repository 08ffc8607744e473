"""Several processes train the student of one: two on CPU (gloo), as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from launched import TORCHRUN, accelerate, distill
from safetensors.torch import load_file
from small_experiment import weights

from cache import Store
from pipeline.distill.join.rank_batches import RankBatches
from pipeline.distill.student import train_student
from pipeline.distill.training.resuming import HEADS_FILE
from pipeline.errors import PipelineError
from pipeline.models.mobilevlm import MobileVLMForCausalLM

# 13 samples in steps of 4, two epochs: the last step of each has one sample, and none is left for the second process.
TWO_EPOCHS = [
    "train.max_steps=-1",
    "train.num_train_epochs=2",
    "train.save_strategy=steps",
    "train.save_steps=3",
]
# Sums round otherwise where a batch is cut otherwise; Adam would magnify that where a gradient is near zero.
SGD = ["train.optim=sgd", "train.learning_rate=0.01"]
LOSS = {"rel": 1e-5, "abs": 1e-7}
WEIGHTS = {"rtol": 1e-5, "atol": 1e-6}


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it wrote, results and the rest, once it is done."""
    try:
        output, complaint = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:  # processes that wait for each other wait for ever
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, complaint
    return output, complaint


def log_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_same_curve(mine: Path, theirs: Path) -> None:
    assert len(log_of(mine)) == len(log_of(theirs)) > 0
    for one, other in zip(log_of(mine), log_of(theirs), strict=True):
        assert one.keys() == other.keys()
        for name in (name for name in other if name != "epoch"):
            assert one[name] == pytest.approx(other[name], **LOSS), (one["step"], name)


def assert_same_student(mine: Path, theirs: Path) -> None:
    for folder, name in (("model", "model.safetensors"), ("checkpoint-8", HEADS_FILE)):
        tensors, expected = load_file(mine / folder / name), load_file(theirs / folder / name)
        assert tensors.keys() == expected.keys()
        for tensor in expected:
            torch.testing.assert_close(
                tensors[tensor], expected[tensor], **WEIGHTS, msg=lambda m, n=tensor: f"{n}: {m}"
            )


@pytest.fixture(scope="module")
def alone(experiment, tmp_path_factory) -> Path:
    """The run of one process, four samples at a time."""
    folder = tmp_path_factory.mktemp("alone")
    config = experiment.config(folder, "evaluate=null", *TWO_EPOCHS, *SGD)
    train_student(config, folder / "align_kd")
    return folder / "align_kd"


def test_two_processes_under_torchrun_give_the_losses_and_the_weights_of_one(experiment, alone, tmp_path):
    half = "train.per_device_train_batch_size=2"
    process = distill(experiment, tmp_path / "two", half, *TWO_EPOCHS, *SGD, launcher=TORCHRUN)
    output, complaint = finish(process)
    assert output == (
        f"student trained: {tmp_path}/two/align_kd/model; no `evaluate` section, so no accuracy was measured\n"
    )
    assert complaint.count("student, Align-KD: ") == 1
    assert_same_curve(tmp_path / "two" / "align_kd", alone)
    assert_same_student(tmp_path / "two" / "align_kd", alone)


def test_two_processes_under_accelerate_with_accumulation_do_too(experiment, alone, tmp_path):
    quarter = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"]
    finish(distill(experiment, tmp_path / "two", *quarter, *TWO_EPOCHS, *SGD, launcher=accelerate("ddp")))
    assert_same_curve(tmp_path / "two" / "align_kd", alone)
    assert_same_student(tmp_path / "two" / "align_kd", alone)


def without_use_cpu(experiment, folder: Path):
    """The experiment as on a machine whose devices are left to transformers."""
    settings = yaml.safe_load(experiment.file.read_text())
    del settings["train"]["use_cpu"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return replace(experiment, file=folder / "config.yaml")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes would take two devices")
def test_two_processes_without_a_device_train_one_student_unasked_too(experiment, alone, tmp_path):
    """transformers connects processes on CPUs only if told that they are to be used."""
    half = ["train.per_device_train_batch_size=2", *TWO_EPOCHS, *SGD]
    unsaid = without_use_cpu(experiment, tmp_path)
    finish(distill(unsaid, tmp_path / "two", *half, launcher=TORCHRUN))
    assert_same_curve(tmp_path / "two" / "align_kd", alone)
    assert_same_student(tmp_path / "two" / "align_kd", alone)


@pytest.mark.parametrize("launched", [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "4", "RANK": "3"}])
def test_processes_that_are_not_connected_are_refused_before_anything_is_written(
    launched, experiment, tmp_path, monkeypatch
):
    unsaid = without_use_cpu(experiment, tmp_path)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        PipelineError,
        match=r"\d processes were started, but this one is connected with 0 others: each would train",
    ):
        train_student(unsaid.config(tmp_path, "train.use_cpu=false"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shares_of_the_gradient_are_those_of_all_processes(experiment, tmp_path):
    """The last step has one sample, and the second process none."""
    epoch = ["log_gradient_shares=true", "train.max_steps=-1", "train.num_train_epochs=1", *SGD]
    train_student(experiment.config(tmp_path, *epoch), tmp_path / "alone")
    half = "train.per_device_train_batch_size=2"
    finish(distill(experiment, tmp_path / "two", half, *epoch, launcher=TORCHRUN))
    assert_same_curve(tmp_path / "two" / "align_kd", tmp_path / "alone")
    assert all("gradient_share/attention" in line for line in log_of(tmp_path / "alone"))


def sharded(experiment, output: Path, *overrides: str) -> Path:
    """A run of two processes by the shipped config of FSDP2."""
    half = "train.per_device_train_batch_size=2"
    process = distill(
        experiment,
        output,
        *[half, *TWO_EPOCHS, *SGD, *overrides],
        launcher=accelerate("fsdp2"),
        program="tests/fsdp_on_cpu.py",
    )
    _, complaint = finish(process)
    # The decoder's two layers and all that is around them; each process holds half of the rows of a matrix.
    assert complaint.count("sharded modules: 3, rows of a matrix: 12 of 24\n") > 0
    return output / "align_kd"


def test_a_sharded_student_has_the_losses_and_is_saved_whole(experiment, alone, tmp_path):
    run = sharded(experiment, tmp_path / "two")
    assert_same_curve(run, alone)
    assert_same_student(run, alone)
    assert MobileVLMForCausalLM.from_pretrained(run / "checkpoint-3").config.hidden_size == 24


@pytest.mark.parametrize(
    "optimizer",
    [
        ["train.optim=adamw_torch", "train.learning_rate=1e-3"],
        ["train.optim=sgd", "train.lr_scheduler_type=linear"],  # has no state, which torch does not expect
    ],
)
def test_a_sharded_run_goes_on_from_its_checkpoint(optimizer, experiment, tmp_path):
    assert_goes_on_from("checkpoint-3", experiment, tmp_path, *optimizer)


def test_a_sharded_run_goes_on_from_a_checkpoint_that_met_no_image_yet(experiment, tmp_path):
    seed = next(seed for seed in range(1000) if steps_of_two(seed)[0] == texts_of(experiment))
    one_each = ["train.per_device_train_batch_size=1", "train.num_train_epochs=1", f"train.data_seed={seed}"]
    adam = ["train.optim=adamw_torch", "train.learning_rate=1e-3", "train.save_steps=1"]
    assert_goes_on_from("checkpoint-1", experiment, tmp_path, *one_each, *adam)


def assert_goes_on_from(checkpoint: str, experiment, tmp_path: Path, *overrides: str) -> None:
    """A sharded run whose later work is lost ends as it did."""
    whole = sharded(experiment, tmp_path / "two", *overrides)
    last = (log_of(whole), weights(whole / "model"))
    for left in (folder for folder in whole.iterdir() if folder.is_dir() and folder.name != checkpoint):
        shutil.rmtree(left)
    (whole / "finished.json").unlink()
    sharded(experiment, tmp_path / "two", *overrides, "train.resume_from_checkpoint=true")
    assert log_of(whole) == last[0]
    assert all(torch.equal(value, last[1][name]) for name, value in weights(whole / "model").items())


def test_shares_of_the_gradient_of_a_sharded_student_are_refused(experiment, tmp_path):
    process = distill(
        experiment,
        tmp_path / "two",
        "log_gradient_shares=true",
        launcher=accelerate("fsdp2"),
        program="tests/fsdp_on_cpu.py",
    )
    _, complaint = process.communicate()
    assert (
        "alignkd: log_gradient_shares needs whole gradients, but FSDP cuts them up; set it to false"
        in complaint
    )


# By default DDP finds out by itself what has no gradient; told not to, it would wait, as FSDP2 does.
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_process_may_have_text_alone(how, experiment, tmp_path):
    """And both in one step, which changes nothing that images alone train, not by weight decay either."""
    seed = next(seed for seed in range(1000) if texts_of(experiment) in steps_of_two(seed))
    shared = [*TWO_EPOCHS, *SGD, f"train.data_seed={seed}", "train.weight_decay=1.0", "train.save_steps=8"]
    whole = "train.per_device_train_batch_size=2"
    train_student(experiment.config(tmp_path, whole, *shared), tmp_path / "alone")
    cut = ["train.per_device_train_batch_size=1", "train.ddp_find_unused_parameters=false"]
    program = "tests/fsdp_on_cpu.py" if how == "fsdp2" else "cli.py"
    finish(distill(experiment, tmp_path / "two", *shared, *cut, launcher=accelerate(how), program=program))
    assert_same_curve(tmp_path / "two" / "align_kd", tmp_path / "alone")
    assert_same_student(tmp_path / "two" / "align_kd", tmp_path / "alone")


def texts_of(experiment) -> set[int]:
    """The two samples without an image, by their place in the store."""
    entries = [
        entry for part in Store(experiment.store).parts for entry in Store(experiment.store).entries(part)
    ]
    return {place for place, entry in enumerate(entries) if not entry.images}


def steps_of_two(seed: int) -> list[set[int]]:
    return [{index for index, _ in batch} for batch in RankBatches(13, 2, seed=seed)]


# How an epoch is cut


@pytest.mark.parametrize("num_samples", [0, 1, 4, 13, 16])
@pytest.mark.parametrize(("batch_size", "num_processes"), [(4, 1), (2, 2), (1, 4)])
def test_however_many_processes_cut_an_epoch_they_meet_the_same_samples_once(
    num_samples, batch_size, num_processes
):
    ranks = [
        RankBatches(num_samples, batch_size, num_processes, rank, seed=3, epoch=1)
        for rank in range(num_processes)
    ]
    steps = [[i for batch in step for i in batch] for step in zip(*ranks, strict=True)]
    real = [[index for index, is_filler in step if not is_filler] for step in steps]
    assert real == [[i for i, _ in batch] for batch in RankBatches(num_samples, 4, seed=3, epoch=1)]
    assert sorted(index for step in real for index in step) == list(range(num_samples))
    assert all(len(batch) > 0 for rank in ranks for batch in rank)
    assert {len(rank) for rank in ranks} == {len(steps)}


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        next(iter(RankBatches(13, 13, seed=seed, epoch=epoch))) for seed, epoch in ((0, 0), (0, 1), (5, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_what_is_left_of_an_epoch_is_dropped_if_asked_for():
    assert [len(batch) for batch in RankBatches(13, 2, 2, drop_last=True)] == [2, 2, 2]
