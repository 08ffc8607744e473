"""Two processes train the twig of one, and a sharded twig is saved whole: on CPU (gloo)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launched import TORCHRUN, accelerate, distill
from safetensors.torch import load_file
from small_experiment import Experiment
from test_scaling import SGD, TWO_EPOCHS, WEIGHTS, assert_same_curve, finish
from test_twig_distillation import LOSSES, OF_BASE, PLACE
from twig_experiment import twig_experiment

from pipeline.twig.training.train import train_twig

HALF = "train.per_device_train_batch_size=2"
COMMAND = ("twig", "train")


@pytest.fixture(scope="module")
def small(experiment, tmp_path_factory) -> Experiment:
    return twig_experiment(experiment, tmp_path_factory.mktemp("twig"))


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    """The run of one process, four samples at a time."""
    folder = tmp_path_factory.mktemp("alone")
    train_twig(small.config(folder, *TWO_EPOCHS, *SGD), folder / "run")
    return folder / "run"


def assert_same_twig(mine: Path, theirs: Path) -> None:
    for folder in ("twig", "checkpoint-3"):
        one, other = (load_file(run / folder / "twig.safetensors") for run in (mine, theirs))
        assert one.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, **WEIGHTS)


def test_two_processes_give_the_losses_and_the_weights_of_one(small, alone, tmp_path):
    run = tmp_path / "two"
    output, complaint = finish(distill(small, run, HALF, *TWO_EPOCHS, *SGD, launcher=TORCHRUN, name=COMMAND))
    assert output.startswith(f"{run}/twig: 0.") and complaint.count("twig: supervised -> ") == 1
    assert_same_curve(run, alone)
    assert_same_twig(run, alone)


def test_a_sharded_twig_has_the_losses_and_is_saved_whole(small, alone, tmp_path):
    run = tmp_path / "two"
    process = distill(
        small,
        run,
        *[HALF, *TWO_EPOCHS, *SGD],
        launcher=accelerate("fsdp2"),
        program="tests/fsdp_on_cpu.py",
        name=COMMAND,
    )
    _, complaint = finish(process)
    # The twig's two layers and all that is around them; each process holds half of the rows of a matrix.
    assert complaint.count("sharded modules: 3, rows of a matrix: 16 of 32\n") > 0
    assert_same_curve(run, alone)
    assert_same_twig(run, alone)


@pytest.fixture(scope="module")
def distilled(experiment, tmp_path_factory) -> Experiment:
    return twig_experiment(
        experiment,
        tmp_path_factory.mktemp("distilled"),
        twig=PLACE | {"first_weights": "random"},  # a copy has next to nothing to learn from this base
        targets=OF_BASE,
        more=LOSSES,
    )


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_a_pruning_head_as_one_does(how, distilled, tmp_path):
    """Batches of one process have text alone."""
    train_twig(distilled.config(tmp_path, *TWO_EPOCHS, *SGD), tmp_path / "alone")
    given = [HALF, *TWO_EPOCHS, *SGD]
    fsdp = {"launcher": accelerate("fsdp2"), "program": "tests/fsdp_on_cpu.py"}
    finish(
        distill(
            distilled,
            tmp_path / "two",
            *given,
            name=COMMAND,
            **({"launcher": TORCHRUN} if how == "ddp" else fsdp),
        )
    )
    assert_same_curve(tmp_path / "two", tmp_path / "alone")
    assert_same_twig(tmp_path / "two", tmp_path / "alone")


def test_two_processes_draw_their_own_choices_and_train_one_pruning_head(distilled, tmp_path):
    twig = train_twig(distilled.config(tmp_path), tmp_path / "first")
    policy = ["losses={policy: {group: 4, keep: [0.5]}, supervised: null}", f"twig.first_weights={twig}"]
    given = [HALF, "train.max_steps=3", *policy]
    finish(distill(distilled, tmp_path / "two", *given, launcher=TORCHRUN, name=COMMAND))
    before, after = (
        load_file(run / "twig" / "twig.safetensors") for run in (tmp_path / "first", tmp_path / "two")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"pruning_head.query.weight", "pruning_head.key.weight"}
