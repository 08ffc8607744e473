"""A twig trained to be like its whole base, in its predictions and in where a layer looks, from the store alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_experiment import Experiment, losses_of_steps
from test_resume import TEN_STEPS
from test_twig_training import LORA, assert_same, assert_same_run, first_weights, reduced, tensors
from twig_experiment import TARGETS, twig_experiment
from watched import train_until

from cache import FingerprintMismatch
from pipeline.distill.join.dataset import JoinCollator
from pipeline.errors import ConfigError
from pipeline.models.loading import load_network
from pipeline.twig.folder import load_twig
from pipeline.twig.training.beginning import Beginning
from pipeline.twig.training.train import build_twig_distiller, train_twig, twig_job

pytestmark = pytest.mark.slow

PLACE = {"attach_layer": 1, "num_layers": 2, "pruning_head": True}
OF_BASE = TARGETS | {"query_attention": {"layer": 2}, "final_hidden": {"codec": "float32"}}
LOSSES = ["losses.query_attention={}", "losses.prediction={}"]
GATES = {"pruning_head.query.weight", "pruning_head.key.weight"}


@pytest.fixture(scope="module")
def made_of(experiment, tmp_path_factory) -> Callable[..., Experiment]:
    return lambda **named: twig_experiment(experiment, tmp_path_factory.mktemp("other"), **named)


@pytest.fixture(scope="module")
def small(made_of) -> Experiment:
    return made_of(twig=PLACE, targets=OF_BASE, more=LOSSES)


def test_every_term_falls_and_every_tensor_moves(small, tmp_path):
    # Random first weights: this base is no deeper than the twig, so that a copy has nothing to learn from it.
    length = ["train.max_steps=60", "train.learning_rate=3e-3"]
    config = small.config(tmp_path, "losses.supervised=null", "twig.first_weights=random", *length)
    before = first_weights(config)
    assert before.keys() >= GATES
    folder = train_twig(config, tmp_path / "run")
    after = tensors(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    steps = losses_of_steps(tmp_path / "run")
    for term in ("query_attention", "prediction"):
        first, last = (sum(step[f"loss/{term}"] for step in some) for some in (steps[:10], steps[-10:]))
        assert last < 0.8 * first, term
    loaded = load_twig(folder, load_network(str(small.teacher), dtype=torch.float32))
    assert_same(loaded.state_dict(), after)


def test_no_tensor_of_the_base_is_needed_but_those_that_the_twig_begins_with(small, made_of, tmp_path):
    train_twig(small.config(tmp_path), tmp_path / "whole")
    alone = made_of(twig=PLACE, targets=OF_BASE, more=LOSSES)
    parts = ("model.layers.1.", "model.layers.2.", "model.norm.", "lm_head.")
    reduced(alone, lambda name: name.startswith(parts))
    train_twig(alone.config(tmp_path), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_random_first_weights_need_the_head_of_the_base_alone(made_of, tmp_path):
    alone = made_of(twig=PLACE | {"first_weights": "random"}, targets=OF_BASE, more=LOSSES)
    reduced(alone, lambda name: name.startswith(("lm_head.", "model.norm.")))
    train_twig(alone.config(tmp_path), tmp_path / "run")
    assert tensors(tmp_path / "run").keys() >= GATES


def test_the_predictions_of_a_twig_of_all_layers_are_those_of_its_base(made_of, tmp_path):
    """So the teacher's logits are those of its stored hidden states and its own head, over the whole vocabulary."""
    every = {"hidden_states": {"layer": 0, "codec": "float32"}, "final_hidden": {"codec": "float32"}}
    whole = made_of(
        twig={"attach_layer": 0, "num_layers": 3}, targets=every, more=["losses.prediction={temperature: 1}"]
    )
    config = whole.config(tmp_path)
    dataset = twig_job(config).dataset
    beginning = Beginning.of(config, dataset.stores.opened[0])
    distiller = build_twig_distiller(config, beginning, dataset)
    batch = JoinCollator(dataset.targets, dataset.preparation.image_token_id)(
        [dataset[n] for n in range(len(dataset))]
    )
    total, count = distiller(batch)["prediction"]
    assert count > 0 and 0 <= float(total) < 1e-4 * float(count)
    with torch.no_grad():
        distiller.twig.head.weight.mul_(0.5)
    total, _ = distiller(batch)["prediction"]
    assert float(total) > 1e-4 * float(count)


def test_a_stopped_training_goes_on_as_if_it_had_not(small, tmp_path):
    for name, more in (("plain", []), ("adapted", [LORA])):
        config = small.config(tmp_path, *TEN_STEPS, *more)
        train_twig(config, tmp_path / name / "whole")
        train_until(5, config, tmp_path / name / "run", train=train_twig)
        train_twig(config, tmp_path / name / "run")
        assert_same_run(tmp_path / name / "run", tmp_path / name / "whole")
        assert tensors(tmp_path / name / "run").keys() >= GATES


def test_a_step_may_be_cut_into_batches(small, tmp_path):
    """Samples without an image, or without one before the question, count for none of the terms that need one."""
    sgd = ["train.max_steps=4", "train.optim=sgd", "train.learning_rate=0.01"]
    train_twig(small.config(tmp_path, *sgd), tmp_path / "whole")
    cut = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    train_twig(small.config(tmp_path, *sgd, *cut, "twig.gradient_checkpointing=true"), tmp_path / "cut")
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [
        {"query_attention": {"layer": 2, "heads": "each"}},
        {"query_attention": {"layer": 2, "source": "recompute"}, "final_hidden": {"source": "recompute"}},
    ],
    ids=["each head", "recomputed"],
)
def test_targets_may_be_stored_by_head_or_recomputed(targets, small, made_of, tmp_path):
    train_twig(small.config(tmp_path), tmp_path / "run")
    other = made_of(twig=PLACE, targets=OF_BASE | targets, more=LOSSES)
    train_twig(other.config(tmp_path), tmp_path / "other")
    assert_same(tensors(tmp_path / "other"), tensors(tmp_path / "run"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["twig.pruning_head=false"], r"losses.query_attention trains the pruning head .* which has none; set twig"),
        (["losses.query_attention=null"], r"twig.pruning_head: true, but nothing trains it; add `losses.query_att"),
        (["targets.final_hidden=null"], r"losses.prediction needs the target 'final_hidden'"),
        (["targets.query_attention=null"], r"losses.query_attention needs the target 'query_attention'"),
        (["losses.prediction.clip=0"], r"losses.prediction.clip: .* greater than 0"),
    ],
)  # fmt: skip
def test_sections_that_do_not_go_together_are_refused(overrides, message, small, tmp_path):
    with pytest.raises(ConfigError, match=message):
        small.config(tmp_path, *overrides)


@pytest.mark.parametrize("loss", ["query_attention", "prediction"])
def test_a_student_is_not_trained_with_the_losses_of_a_twig(loss, experiment, tmp_path):
    with pytest.raises(
        ConfigError, match=rf"losses.{loss} trains a twig, and the config has no `twig` section"
    ):
        experiment.config(tmp_path, f"losses.{loss}={{}}")


def test_a_store_of_another_layer_is_refused(small, tmp_path):
    with pytest.raises(FingerprintMismatch, match=r"query_attention"):
        train_twig(small.config(tmp_path, "targets.query_attention.layer=1"), tmp_path / "run")


def test_first_weights_with_a_pruning_head_are_not_those_of_a_twig_without_one(small, tmp_path):
    without = ["twig.pruning_head=false", "losses.query_attention=null"]
    train_twig(small.config(tmp_path, *without), tmp_path / "without")
    train_twig(small.config(tmp_path), tmp_path / "with")
    for found, more, message in (
        (
            "without",
            [],
            r"twig.first_weights: .* has no pruning head, and twig.pruning_head: true was asked for",
        ),
        (
            "with",
            without,
            r"twig.first_weights: .* has a pruning head, and twig.pruning_head: false was asked for",
        ),
    ):
        first = f"twig.first_weights={tmp_path / found / 'twig'}"
        with pytest.raises(ConfigError, match=message):
            train_twig(small.config(tmp_path, *more, first), tmp_path / "run")
