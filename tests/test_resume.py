"""Stopped and gone on with: the loss curve and the weights are those of a run in one piece, bit for bit on CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launched import TORCHRUN, distill
from small_experiment import STUDENT_LOSSES, log_of, weights
from watched import steps_of_training, train_until

from pipeline.distill.student import train_student
from pipeline.distill.training.interruption import StopOnSignal

# 13 samples in steps of 2 x 2: four steps an epoch, the last of one sample. Losses are logged over three steps.
CUT = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
TEN_STEPS = [*CUT, "train.max_steps=10", "train.logging_steps=3", "train.resume_from_checkpoint=true"]


def curve(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in log_of(folder) if "loss" in entry]


def assert_same_run(mine: Path, theirs: Path) -> None:
    assert curve(mine) == curve(theirs)
    for name, value in weights(theirs / "model").items():
        assert torch.equal(weights(mine / "model")[name], value), name


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory) -> Path:
    """The run in one piece, without a checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    train_student(experiment.config(folder, *TEN_STEPS), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (4, 0), (5, 0), (9, 0), (4, 2), (6, 2)])
def test_a_run_stopped_after_any_step_goes_on_as_if_it_had_not(step, workers, experiment, whole, tmp_path):
    config = experiment.config(tmp_path, *TEN_STEPS, f"train.dataloader_num_workers={workers}")
    train_until(step, config, tmp_path / "run", match=rf"after step {step} of 10, checkp")
    assert [file.name for file in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "run" / "finished.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_leaves_a_checkpoint_and_says_what_to_type_next(experiment, whole, tmp_path, capfd):
    config = experiment.config(tmp_path, *TEN_STEPS)
    told = (
        r"run: stopped by Ctrl-C after step 4 of 10, checkpoint-4 is written; run the same command with train"
    )
    stopped = train_until(4, config, tmp_path / "run", sent=signal.SIGINT, match=told)
    assert stopped.exit_code == 130
    said = "stopping after this step, with a checkpoint; Ctrl-C again ends at once"
    assert capfd.readouterr().err.splitlines().count(said) == 1
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_second_ctrl_c_ends_at_once_but_not_one_that_a_launcher_sends_after_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with StopOnSignal() as stop:
        for later in (0.0, 0.5):
            now[0] += later
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked and stop.exit_code == 130
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_job_in_the_background_of_a_script_ignores_ctrl_c_as_before():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_may_be_stopped_again_and_again(experiment, whole, tmp_path):
    config = experiment.config(tmp_path, *TEN_STEPS)
    for step in (2, 4, 7):
        train_until(step, config, tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_student_of_labels_alone_goes_on_too(experiment, tmp_path):
    alone = [f"losses.{name}=null" for name in STUDENT_LOSSES if name != "supervised"]
    config = experiment.config(tmp_path, *TEN_STEPS, *alone)
    train_student(config, tmp_path / "whole")
    train_until(5, config, tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigterm_in_the_last_step_leaves_a_finished_run(experiment, whole, tmp_path):
    told = r"run: trained to its end before SIGTERM stopped the rest; run the same"
    train_until(10, experiment.config(tmp_path, *TEN_STEPS), tmp_path / "run", match=told)
    assert (tmp_path / "run" / "finished.json").is_file()
    assert_same_run(tmp_path / "run", whole)


def test_going_on_trains_on_no_sample_of_before(experiment, tmp_path):
    config = experiment.config(tmp_path, *TEN_STEPS, "train.max_steps=8")
    with steps_of_training() as in_one_piece:
        train_student(config, tmp_path / "whole")
    assert [len(step) for step in in_one_piece[:4]] == [4, 4, 4, 1]
    train_until(6, config, tmp_path / "run")
    with steps_of_training() as steps:
        train_student(config, tmp_path / "run")
    assert steps == in_one_piece[6:]


# As a user does it: the command line, killed


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


LONG = ["train.max_steps=200", "train.logging_steps=20", "train.save_strategy=steps", "train.save_steps=30"]
LONG += [*CUT, "train.resume_from_checkpoint=true"]


@pytest.fixture(scope="module")
def long_run(experiment, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    process = distill(experiment, folder / "out", *LONG)
    assert process.communicate() and process.returncode == 0
    return folder / "out" / "align_kd"


CODES = [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]


@pytest.mark.parametrize(("sent", "code"), CODES)
def test_a_command_that_is_killed_is_gone_on_with_by_the_same_command(
    sent, code, experiment, long_run, tmp_path
):
    run = tmp_path / "out" / "align_kd"
    two_workers = "train.dataloader_num_workers=2"
    process = distill(experiment, tmp_path / "out", *LONG, two_workers)
    wait_for(run / "checkpoint-60" / "trainer_state.json", process)
    os.killpg(process.pid, sent)  # as SLURM does: also the data-loading workers
    output, complaint = process.communicate()
    assert (process.returncode, output) == (code, "")
    if sent != signal.SIGKILL:
        by = "SIGTERM" if sent == signal.SIGTERM else "Ctrl-C"
        assert complaint.splitlines()[-1].startswith(f"alignkd: {run}: stopped by {by} after step ")
    again = distill(experiment, tmp_path / "out", *LONG, two_workers)
    assert again.communicate()[0].startswith("student trained") and again.returncode == 0
    assert_same_run(run, long_run)


@pytest.mark.parametrize(("sent", "by"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_two_processes_stop_together_and_one_goes_on(sent, by, experiment, tmp_path):
    """The global batch stays, the number of processes does not: the curve is the same within rounding."""
    sgd = ["train.optim=sgd", "train.learning_rate=0.001"]
    long = [*LONG, *sgd, "train.max_steps=150", "train.logging_steps=1"]
    run = tmp_path / "out" / "align_kd"
    process = distill(
        experiment, tmp_path / "out", *long, "train.gradient_accumulation_steps=1", launcher=TORCHRUN
    )
    wait_for(run / "checkpoint-30" / "trainer_state.json", process)
    process.send_signal(sent)
    _, complaint = process.communicate()
    assert process.returncode != 0
    step = max(int(file.name.split("-")[1]) for file in run.glob("checkpoint-*"))
    assert f"stopped by {by} after step {step} of 150" in complaint and step < 150
    again = distill(experiment, tmp_path / "out", *long)
    assert again.communicate() and again.returncode == 0
    process = distill(experiment, tmp_path / "alone", *long)
    assert process.communicate() and process.returncode == 0
    for mine, theirs in zip(curve(run), curve(tmp_path / "alone" / "align_kd"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), mine["step"]
