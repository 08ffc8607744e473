"""The global batch: a run is resumed and found finished with its own alone, however processes and batches cut it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import recorded_steps
from launched import TORCHRUN, distill
from small_experiment import snapshot, weights
from transformers import TrainerCallback
from watched import Tokens, steps_of_training, train_until

from pipeline.config.provenance import read_mark
from pipeline.distill.join.rank_batches import RankBatches
from pipeline.distill.student import train_student
from pipeline.distill.training.resuming import RUN_FILE
from pipeline.errors import ConfigError, PipelineError

RESUMED = "train.resume_from_checkpoint=true"
EPOCHS = ["train.max_steps=-1", "train.num_train_epochs=3", RESUMED]
GLOBAL_BATCH = r"samples per step \(batch size x accumulation x processes\)"


def cut(size: int, accumulation: int = 1) -> list[str]:
    return [f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={accumulation}"]


@pytest.fixture
def steps() -> Iterator[list[list[Tokens]]]:
    """The samples of every step that the test's runs make, in their order, by their token ids."""
    with steps_of_training() as made:
        yield made


@pytest.fixture
def stopped(experiment, tmp_path):
    """Runs the experiment into one folder, stopped after a step; `None` lets it come to its end."""

    def run(step: int | None, *overrides: str, folder: str = "run", overwrite: bool = False) -> Path:
        config = experiment.config(tmp_path, *overrides)
        if step is None:
            train_student(config, tmp_path / folder, overwrite=overwrite)
        else:
            train_until(step, config, tmp_path / folder)
        return tmp_path / folder

    return run


@pytest.mark.parametrize("asked", ["true", "checkpoint-2"])
def test_a_checkpoint_of_another_global_batch_is_refused_with_what_to_do(asked, stopped):
    run = stopped(2, *EPOCHS, *cut(4))
    before = snapshot(run)
    asked = asked if asked == "true" else str(run / asked)
    told = (
        rf"^train\.resume_from_checkpoint: .*checkpoint-2 was made with other settings: {GLOBAL_BATCH}: 4 -> 6; "
        r"restore them, give another output_dir, or --overwrite to train anew in its place$"
    )
    with pytest.raises(ConfigError, match=told):
        stopped(None, *EPOCHS, *cut(3, 2), f"train.resume_from_checkpoint={asked}")
    assert snapshot(run) == before
    assert read_mark(run / "checkpoint-2" / RUN_FILE)["samples_per_step"] == 4


@pytest.mark.parametrize("step", [2, 4, 5])
def test_batches_may_be_cut_otherwise_while_their_product_stays(step, steps, stopped):
    stopped(step, *EPOCHS, *cut(4))
    resumed = stopped(None, *EPOCHS, *cut(1, 4))
    cut_otherwise = list(steps)
    steps.clear()
    whole = stopped(None, *EPOCHS, *cut(4), folder="whole")
    assert cut_otherwise == steps
    for mine, theirs in zip(losses_of(resumed), losses_of(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def losses_of(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def test_two_processes_resume_what_one_began_at_the_next_step(
    experiment, steps, stopped, tmp_path, monkeypatch
):
    run = stopped(2, *EPOCHS, *cut(4), folder="out/align_kd")
    stopped(None, *EPOCHS, *cut(4), folder="whole")
    monkeypatch.setenv(recorded_steps.FOLDER, str(tmp_path))
    process = distill(
        experiment, run.parent, *EPOCHS, *cut(2), launcher=TORCHRUN, program="tests/recorded_steps.py"
    )
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    ranks = [(tmp_path / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    pairs = zip(*ranks, strict=True)
    together = [sorted(map(tuple, json.loads(one) + json.loads(other))) for one, other in pairs]
    assert together == [sorted(step) for step in steps[2 + 2 :]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_a_dropped_end_leaves_of_an_epoch_does_not_depend_on_the_cut(size):
    batches = list(RankBatches(13, size, drop_last=True, accumulation=4 // size, seed=3))
    assert [index for batch in batches for index in batch] == next(iter(RankBatches(13, 12, seed=3)))


def test_a_run_that_was_done_but_for_its_mark_makes_no_step_more(steps, stopped):
    saving = ["train.save_strategy=steps", "train.save_steps=3", "train.max_steps=6", RESUMED, *cut(4)]
    run = stopped(None, *saving)
    last = weights(run / "model")
    (run / "finished.json").unlink()
    shutil.rmtree(run / "model")
    stopped(None, *saving)
    assert len(steps) == 6
    assert all(value.equal(last[name]) for name, value in weights(run / "model").items())


def test_a_finished_run_is_not_that_of_another_global_batch(steps, stopped):
    saving = ["train.save_strategy=steps", "train.save_steps=1"]
    run = stopped(None, *saving, *cut(4))
    assert len(steps) == 2
    stopped(None, *saving, *cut(2, 2))
    assert len(steps) == 2  # the same four samples a step: it is that run
    for asked in ([], [RESUMED]):
        with pytest.raises(
            PipelineError, match=rf"run holds a finished training, .*: {GLOBAL_BATCH}: 4 -> 6;"
        ):
            stopped(None, *saving, *cut(6), *asked)
    assert (run / "finished.json").is_file() and len(steps) == 2
    stopped(None, *saving, *cut(6), overwrite=True)
    assert [len(made) for made in steps[2:]] == [6, 6]


def test_a_step_longer_than_the_data_is_refused_where_its_rest_is_dropped(stopped):
    told = (
        r"^train\.dataloader_drop_last leaves no step: \d+ samples are fewer than the 4096 of a step \(batch size x "
        r"accumulation x processes\); set it to false, or make the step smaller$"
    )
    with pytest.raises(ConfigError, match=told):
        stopped(None, "train.dataloader_drop_last=true", *cut(4, 1024))


class OutOfMemory(TrainerCallback):
    """Fails at the beginning of this step as CUDA does, for batches of more than one sample."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and (state.train_batch_size or 1) > 1:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_that_memory_does_not_hold_is_halved_if_asked_for_and_the_log_begins_again(
    steps, experiment, tmp_path
):
    asked = ["train.auto_find_batch_size=true", "train.max_steps=4", "train.logging_steps=2", *cut(2)]
    config = experiment.config(tmp_path, *asked)
    train_student(config, tmp_path / "run", callbacks=[OutOfMemory(4)])
    assert [len(step) for step in steps] == [2, 2, 2, 1, 1, 1, 1]
    first, second, end = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    terms = [key for key in first if key.startswith("loss/") and key.endswith("_weighted")]
    assert (first["step"], second["step"], end["samples_seen"]) == (2, 4, 4)
    for line in (first, second):
        assert 0 < line["loss"] < 2 * sum(line[term] for term in terms)
