"""The folder of a training: what is there is resumed or kept, and replaced only if that is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import ROOT
from small_experiment import snapshot
from test_resume import assert_same_run
from watched import train_until

from pipeline.distill.student import train_student
from pipeline.distill.training.run_identity import NOT_SET, Change, is_longer
from pipeline.distill.training.training_folder import RUN_FILE
from pipeline.errors import ConfigError, PipelineError

RESUME = "train.resume_from_checkpoint=true"
SAVING = ["train.save_strategy=steps", "train.save_steps=2"]


@pytest.fixture
def trained(experiment, tmp_path):
    """Trains into one folder; stopped after a step if one is given."""

    def run(*overrides: str, step: int | None = None, folder: str = "run", overwrite: bool = False) -> Path:
        config = experiment.config(tmp_path, *overrides)
        if step is None:
            train_student(config, tmp_path / folder, overwrite=overwrite)
        else:
            train_until(step, config, tmp_path / folder, overwrite=overwrite)
        return tmp_path / folder

    return run


def kept(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {name: file for name, file in snapshot(folder).items() if name != "lock"}


def test_a_finished_training_of_other_settings_is_kept_and_what_differs_is_named(trained):
    run = trained(*SAVING)
    before = kept(run)
    for changes, named in (
        (["losses.logits=null"], r'losses\.logits: \{"weight": 0\.1.*\} -> null;'),
        (["train.seed=7"], r"train\.seed: not set -> 7;"),
        (["train.seed=7", "student.dtype=bfloat16"], r"student\.dtype: .* -> .*, train\.seed: not set -> 7;"),
    ):
        for asked in ([], [RESUME]):
            with pytest.raises(PipelineError, match=rf"run holds a finished training, made with .*: {named}"):
                trained(*SAVING, *changes, *asked)
    assert kept(run) == before


def test_overwriting_removes_what_a_training_left_and_nothing_else(trained, capfd):
    run = trained(*SAVING, "train.max_steps=4")
    for mine in ("notes.txt", "checkpoint-mine/weights.bin", "model/README.md"):
        (run / mine).parent.mkdir(exist_ok=True)
        (run / mine).write_text("mine")
    trained("train.seed=7", overwrite=True)
    left = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert {"notes.txt", "checkpoint-mine/weights.bin", "model/README.md"} < left
    assert not [name for name in left if name.startswith(("checkpoint-2", "checkpoint-4"))]
    removed = "removed finished.json, trainer_state.json, checkpoint-4, checkpoint-2, model/model.safetensors"
    assert f"{run}: training anew, {removed}" in capfd.readouterr().err


def test_overwriting_what_is_the_same_training_keeps_it(trained):
    run = trained()
    before = kept(run)
    trained(overwrite=True)
    assert kept(run) == before


def test_checkpoints_of_the_same_training_are_not_begun_anew_over_unasked(trained):
    run = trained("train.max_steps=4", step=3)
    before = kept(run)
    told = (
        rf"run holds checkpoint-3 of this training; {RESUME} resumes it, --overwrite trains anew in its place"
    )
    with pytest.raises(PipelineError, match=told):
        trained("train.max_steps=4")
    assert kept(run) == before
    trained("train.max_steps=4", overwrite=True)
    assert [file.name for file in run.glob("checkpoint-*")] == []


def test_nor_are_those_of_another(trained):
    run = trained("train.max_steps=4", step=3)
    before = kept(run)
    with pytest.raises(
        PipelineError, match=r"checkpoint-3 was made with other settings: train\.seed: not set -> 7"
    ):
        trained("train.max_steps=4", "train.seed=7")
    assert kept(run) == before


def test_a_mark_of_an_earlier_version_says_only_that_something_differs(trained):
    run = trained()
    mark = json.loads((run / "finished.json").read_text())
    del mark["made_of"]
    (run / "finished.json").write_text(json.dumps(mark))
    before = kept(run)
    trained()
    with pytest.raises(
        PipelineError, match=r"made with other settings: settings, data or first weights: others -> "
    ):
        trained("train.seed=7")
    assert kept(run) == before


# How long a training is


CONSTANT = ["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=3", "train.logging_steps=3"]
EPOCHS = ["train.max_steps=-1", "train.num_train_epochs={}"]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (["train.max_steps=5"], ["train.max_steps=9"]),
        ([part.format(1) for part in EPOCHS], [part.format(2) for part in EPOCHS]),
    ],
)
def test_a_finished_training_is_made_longer_as_if_it_had_been_so_from_the_start(short, long, trained):
    run = trained(*SAVING, *CONSTANT, *short)
    with pytest.raises(PipelineError, match=rf"train\.\w+: \d -> \d, which {RESUME} makes longer"):
        trained(*SAVING, *CONSTANT, *long)
    trained(*SAVING, *CONSTANT, *long, RESUME)
    assert_same_run(run, trained(*SAVING, *CONSTANT, *long, folder="whole"))


def test_so_is_one_under_way(trained):
    run = trained(*CONSTANT, "train.max_steps=5", step=4)
    trained(*CONSTANT, "train.max_steps=9", RESUME)
    assert_same_run(run, trained(*CONSTANT, "train.max_steps=9", folder="whole"))


@pytest.mark.parametrize(
    ("schedule", "length", "why"),
    [
        (
            ["train.lr_scheduler_type=linear"],
            9,
            r"cannot be made longer under train\.lr_scheduler_type linear: the",
        ),
        (
            ["train.lr_scheduler_type=cosine"],
            9,
            r"train\.lr_scheduler_type cosine: the learning rate of every step",
        ),
        (
            ["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=0.5"],
            9,
            r"with a warm-up in steps",
        ),
        (["train.lr_scheduler_type=constant"], 3, r"a run can be made longer, not shorter"),
    ],
)
def test_where_its_steps_would_have_been_others_it_is_not(schedule, length, why, trained):
    run = trained(*SAVING, *schedule, "train.max_steps=5")
    before = kept(run)
    with pytest.raises(PipelineError, match=rf"train\.max_steps: 5 -> {length} \(.*{why}"):
        trained(*SAVING, *schedule, f"train.max_steps={length}", RESUME)
    assert kept(run) == before
    (run / "finished.json").unlink()
    with pytest.raises(ConfigError, match=rf"checkpoint-5 was .*train\.max_steps: 5 -> {length} \(.*{why}"):
        trained(*SAVING, *schedule, f"train.max_steps={length}", RESUME)


def test_without_a_checkpoint_a_finished_training_stays_as_long_as_it_is(trained):
    trained("train.max_steps=2")
    with pytest.raises(
        PipelineError, match=r"max_steps: 2 -> 5, but without a checkpoint to make it longer from"
    ):
        trained("train.max_steps=5", RESUME)


def test_a_checkpoint_says_what_it_was_made_of(trained):
    run = trained(*SAVING)
    made_of = json.loads((run / "checkpoint-2" / RUN_FILE).read_text())["made_of"]
    assert made_of == json.loads((run / "finished.json").read_text())["made_of"]
    assert made_of["losses"]["logits"]["weight"] == 0.1 and made_of["samples"]["number"] == 13


@pytest.mark.parametrize(
    ("key", "old", "new", "longer"),
    [
        ("train.max_steps", 2, 3, True),
        ("train.max_steps", 3, 2, False),
        ("train.max_steps", NOT_SET, 9, False),
        ("train.max_steps", -1, 9, False),
        ("train.num_train_epochs", NOT_SET, 4, True),
        ("train.num_train_epochs", NOT_SET, 2, False),
        ("train.seed", 1, 2, False),
    ],
)
def test_longer_is_more_steps_or_epochs_than_there_were(key, old, new, longer):
    assert is_longer([Change(key, old, new)]) == longer
    assert not is_longer([Change(key, old, new), Change("data.fraction", 1.0, 0.5)])


# One at a time


def test_two_trainings_into_one_folder_are_refused(trained, tmp_path):
    (tmp_path / "run").mkdir()
    holder = (
        "import sys; from pathlib import Path; from pipeline.distill.training.processes import alone_in\n"
    )
    holder += "with alone_in(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(PipelineError, match=r"run: another process is training there; wait for it"):
        trained()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    process.communicate()
    trained()
