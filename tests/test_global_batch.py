"""Going on with another global batch: each epoch is read once, in the seed's order, and a run keeps its length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import recorded_steps
from hypothesis import given
from hypothesis import strategies as st
from launched import TORCHRUN, distill
from small_experiment import weights
from test_resume import assert_same_run
from watched import Tokens, steps_of_training, tokens_of, train_until

from cache import Store
from pipeline.config.provenance import read_mark
from pipeline.data.preparation import Preparation
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.join.rank_batches import Filler, RankBatches
from pipeline.distill.student import train_student
from pipeline.distill.training.data_position import DataPosition
from pipeline.distill.training.trainer import RUN_FILE
from pipeline.errors import PipelineError

# How steps are cut: batch size, processes, accumulation.
Cut = tuple[int, int, int]
CUTS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
NUM_SAMPLES = 13


# The cut alone, with nothing trained


def samples_of(cut: Cut) -> int:
    return cut[0] * cut[1] * cut[2]


def joined(steps: Sequence[Sequence[Any]]) -> list[Any]:
    return [sample for step in steps for sample in step]


def rest_of_epoch(num_samples: int, cut: Cut, start: DataPosition) -> list[list[int]]:
    """The samples of each step from `start` to the epoch's end, as all processes together read them."""
    size, processes, accumulation = cut
    ranks = [
        list(RankBatches(num_samples, size, processes, rank, seed=7, epoch=start.epoch,
                         first_epoch=start.epoch, first_sample=start.sample))
        for rank in range(processes)
    ]  # fmt: skip
    together = [joined(batch) for batch in zip(*ranks, strict=True)]
    steps = [joined(together[n : n + accumulation]) for n in range(0, len(together), accumulation)]
    return [[i for i in step if not isinstance(i, Filler)] for step in steps[start.steps_into_epoch :]]


@given(st.integers(1, 60), st.lists(st.tuples(CUTS, st.integers(0, 12)), min_size=1, max_size=6))
def test_however_often_the_cut_changes_an_epoch_is_read_once_in_its_order(num_samples, pieces):
    position, read = DataPosition(samples_of(pieces[0][0])), {}
    for cut, num_steps in [*pieces, (pieces[0][0], 100)]:
        position = position.in_steps_of(samples_of(cut), num_samples)
        for _ in range(num_steps):
            step = rest_of_epoch(num_samples, cut, position)[0]
            assert 0 < len(step) <= samples_of(cut)
            read.setdefault(position.epoch, []).extend(step)
            position = position.after_step(num_samples)
    *whole, last = read
    for epoch in whole:
        assert read[epoch] == next(iter(RankBatches(num_samples, num_samples, seed=7, epoch=epoch)))
    assert (
        read[last] == next(iter(RankBatches(num_samples, num_samples, seed=7, epoch=last)))[: len(read[last])]
    )
    assert position.step == sum(num_steps for _, num_steps in pieces) + 100


@given(CUTS, CUTS, st.integers(1, 60), st.integers(0, 20))
def test_after_the_first_step_the_cut_is_that_of_a_run_in_one_piece(before, after, num_samples, num_steps):
    position = DataPosition(samples_of(before))
    for _ in range(num_steps):
        position = position.after_step(num_samples)
    position = position.in_steps_of(samples_of(after), num_samples)
    straight = rest_of_epoch(num_samples, after, DataPosition(samples_of(after), epoch=position.epoch))
    first, *others = rest_of_epoch(num_samples, after, position)
    assert others == straight[position.steps_into_epoch + 1 :]
    assert first == straight[position.steps_into_epoch][position.sample % samples_of(after) :]


@given(st.integers(1, 12), st.integers(1, 30))
def test_a_position_of_steps_all_alike_is_worked_out_from_their_number(samples_per_step, num_samples):
    position, steps_an_epoch = DataPosition(samples_per_step), -(-num_samples // samples_per_step)
    for step in range(40):
        assert (position.step, position.samples_seen) == (step, step * samples_per_step)
        assert (position.epoch, position.steps_into_epoch) == divmod(step, steps_an_epoch)
        position = position.after_step(num_samples)


def test_a_position_beyond_what_the_new_cut_does_not_drop_is_at_the_next_epochs_beginning():
    batches = RankBatches(NUM_SAMPLES, 8, drop_last=True)
    position = DataPosition(5, step=2, sample=10, samples_seen=10)
    assert position.in_steps_of(8, batches.samples_an_epoch) == DataPosition(8, 2, epoch=1, samples_seen=10)


# Runs


def cut(size: int, accumulation: int = 1) -> list[str]:
    return [f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={accumulation}"]


RESUMED = "train.resume_from_checkpoint=true"
EPOCHS = ["train.max_steps=-1", "train.num_train_epochs=3", RESUMED]
LINEAR = ["train.lr_scheduler_type=linear", "train.warmup_steps=0.2"]


@pytest.fixture
def steps() -> Iterator[list[list[Tokens]]]:
    """The samples of every step that the test's runs make, in their order, by their token ids."""
    with steps_of_training() as made:
        yield made


@pytest.fixture(scope="module")
def orders(experiment, tmp_path_factory) -> list[list[Tokens]]:
    """The samples of five epochs, in the order of the experiment's seed, by their token ids."""
    config = experiment.config(tmp_path_factory.mktemp("orders"))
    preparation = Preparation.of(config.student.model, config.data)
    store = Store(config.one_cache.path)
    rows = JoinedDataset(store, config.data.shards, preparation, targets={}).rows
    cuts = RankBatches(NUM_SAMPLES, NUM_SAMPLES, seed=42)
    found = []
    for epoch in range(5):
        cuts.set_epoch(epoch)
        found.append([tokens_of(store, rows[index][1].key) for index in next(iter(cuts))])
    return found


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


def log_of(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize(
    ("before", "step", "after", "sizes_after"),
    [
        (cut(4), 1, cut(8), [4, 5, 8, 5, 8, 5]),
        (cut(4), 6, cut(2), [2, 2, 1, 2, 2, 2, 2, 2, 2, 1]),
        (cut(8), 1, cut(6), [4, 1, 6, 6, 1, 6, 6, 1]),
        (cut(2, 2), 4, cut(3, 2), [6, 6, 1, 6, 6, 1]),  # between two epochs
        (cut(2, 2), 10, cut(1, 5), [2, 3]),  # a short step, three of whose micro-batches are behind already
        (cut(5), 8, cut(13), [3]),
    ],
)  # fmt: skip
def test_a_run_over_epochs_reads_each_once_and_in_order(
    before, step, after, sizes_after, steps, orders, stopped, capfd
):
    run = stopped(step, *EPOCHS, *before)
    num_before = len(joined(steps))
    stopped(None, *EPOCHS, *after)
    assert joined(steps) == joined(orders[:3])
    assert [len(made) for made in steps[step:]] == sizes_after
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == len(steps) and state["epoch"] == 3
    read, epoch = num_before % NUM_SAMPLES, num_before // NUM_SAMPLES + 1
    assert f"after {read} of 13 samples of epoch {epoch}\n" in capfd.readouterr().err


def test_it_is_told_on_stderr_and_in_the_log(stopped, capfd):
    run = stopped(5, *EPOCHS, *cut(4))
    assert "samples a step" not in capfd.readouterr().err
    stopped(None, *EPOCHS, *cut(3, 2))
    told = f"{run}/checkpoint-5 was made with 4 samples a step; going on with 6, after 4 of 13 samples of epoch 2"
    assert capfd.readouterr().err.splitlines().count(told) == 1
    entry = {"samples_per_step": 6, "samples_per_step_before": 4, "epoch": 1.25, "step": 5}
    log = log_of(run)
    assert log.count(entry) == 1
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 12))
    # Of 4 samples five steps, the short last one counted as full; then 2, 6, 6 and 6, 6, 6.
    assert log[-1]["samples_seen"] == 20 + 2 + 6 + 6 + 18


def test_max_steps_stays_the_number_of_all_steps(steps, orders, stopped):
    ten = ["train.max_steps=10", RESUMED, *LINEAR]
    run = stopped(5, *ten, *cut(4))
    stopped(None, *ten, *cut(6))
    assert [len(made) for made in steps] == [4, 4, 4, 1, 4, 2, 6, 1, 6, 6]
    assert joined(steps) == joined(orders)[:38]
    stopped(None, *ten, *cut(4), folder="whole")
    rates, expected = (
        [line["learning_rate"] for line in log_of(folder) if "loss" in line]
        for folder in (run, run.parent / "whole")
    )
    assert rates == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_over_epochs_the_learning_rate_is_that_of_a_run_with_the_new_steps(schedule, stopped):
    scheduled = [*EPOCHS, *LINEAR, f"train.lr_scheduler_type={schedule}"]
    run = stopped(6, *scheduled, *cut(2))
    stopped(None, *scheduled, *cut(4))
    whole = stopped(None, *scheduled, *cut(4), folder="whole")
    mine, theirs = (
        [line["learning_rate"] for line in log_of(folder) if "loss" in line] for folder in (run, whole)
    )
    assert len(mine) == 6 + 9 and mine[6:] == theirs[3:]  # 12 samples are 3 steps of 4


def test_it_may_change_again_and_again(steps, orders, stopped):
    for step, size in ((2, 4), (3, 6), (6, 1), (8, 5)):
        stopped(step, *EPOCHS, *cut(size))
    stopped(None, *EPOCHS, *cut(4))
    assert joined(steps) == joined(orders[:3])


@pytest.mark.parametrize("length", [EPOCHS, ["train.max_steps=12", RESUMED]])
def test_a_run_that_changed_goes_on_bit_for_bit_too(length, stopped):
    long = [*length, *LINEAR, "train.logging_steps=3"]
    run = stopped(5, *long, *cut(4))
    shutil.copytree(run, run.parent / "other")
    stopped(None, *long, *cut(3, 2))
    stopped(7, *long, *cut(3, 2), folder="other")
    stopped(None, *long, *cut(3, 2), folder="other")
    assert_same_run(run.parent / "other", run)


def test_two_processes_go_on_with_what_one_began(experiment, steps, orders, stopped, tmp_path, monkeypatch):
    run = stopped(2, *EPOCHS, *cut(4), folder="out/align_kd")
    monkeypatch.setenv(recorded_steps.FOLDER, str(tmp_path))
    process = distill(
        experiment, run.parent, *EPOCHS, *cut(1, 3), launcher=TORCHRUN, program="tests/recorded_steps.py"
    )
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    ranks = [(tmp_path / f"{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    together = [
        sorted(map(tuple, json.loads(one) + json.loads(other))) for one, other in zip(*ranks, strict=True)
    ]
    rest = [orders[0][8:12], orders[0][12:]]
    rest += [order[n : n + 6] for order in orders[1:3] for n in (0, 6, 12)]
    assert together == [sorted(step) for step in rest]
    assert (
        complaint.count("was made with 4 samples a step; going on with 6, after 8 of 13 samples of epoch 1")
        == 1
    )


# Ends


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
            PipelineError, match=r"run holds a finished training, .*: samples a step: 4 -> 6;"
        ):
            stopped(None, *saving, *cut(6), *asked)
    assert (run / "finished.json").is_file() and len(steps) == 2
    stopped(None, *saving, *cut(6), overwrite=True)
    assert [len(made) for made in steps[2:]] == [6, 6]


def test_a_checkpoint_says_where_in_the_data_it_was_made(stopped):
    run = stopped(6, *EPOCHS, *cut(4))
    position = read_mark(run / "checkpoint-6" / RUN_FILE)["position"]
    assert DataPosition(**position) == DataPosition(4, step=6, epoch=1, sample=8, samples_seen=24)


def test_what_goes_on_is_the_run_that_began_last_not_the_one_that_came_furthest(steps, orders, stopped):
    """As of two runs whose checkpoints came into one folder."""
    run = stopped(6, *EPOCHS, *cut(2))
    other = stopped(2, *EPOCHS, *cut(4), folder="other")
    shutil.copytree(other / "checkpoint-2", run / "checkpoint-2")
    steps.clear()
    stopped(4, *EPOCHS, *cut(4))
    assert joined(steps) == orders[0][8:]
    assert sorted(file.name for file in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    steps.clear()
    stopped(5, *EPOCHS, *cut(2))
    assert joined(steps) == orders[1][:2]
