"""What a sweep varies: every combination once, named by what it uses, beside its run on labels alone."""

from __future__ import annotations

import pytest

from pipeline.config.config import load_config
from pipeline.errors import ConfigError
from pipeline.sweep.variations import parse_vary, plan_runs


@pytest.fixture
def plan(experiment):
    """Plans runs of the small experiment from `--vary` texts."""

    def of(*vary: str, one_at_a_time: bool = False):
        return plan_runs(
            lambda overrides: load_config(experiment.file, overrides),
            parse_vary(vary),
            one_at_a_time=one_at_a_time,
        )

    return of


def test_values_are_yaml():
    assert parse_vary(["train.seed=0,1", "losses.attention.layers=[[0, 0]],[[0, 0], [1, 1]]", "x=1e-3"]) == {
        "train.seed": [0, 1],
        "losses.attention.layers": [[[0, 0]], [[0, 0], [1, 1]]],
        "x": [1e-3],
    }


@pytest.mark.parametrize("text", ["losses", "losses=", "=none", ""])
def test_a_vary_without_key_or_values_says_what_is_expected(text):
    with pytest.raises(ConfigError, match=r"expected key=value,value such as losses=none,all"):
        parse_vary([text])


def test_values_that_are_no_yaml_are_told():
    with pytest.raises(ConfigError, match="the values are not readable as YAML"):
        parse_vary(["train.seed=[1"])


def test_a_key_is_varied_once():
    with pytest.raises(ConfigError, match="losses is varied twice; give all its values at once"):
        parse_vary(["losses=none", "losses=all"])


def test_a_loss_set_keeps_labels_and_the_losses_that_it_names(plan):
    sets = "losses=none,attention,vision_all+logits,all,all-logits"
    active = {run.name: list(run.config.losses.active()) for run in plan(sets)}
    assert active == {
        "losses=none": ["supervised"],
        "losses=attention": ["supervised", "attention"],
        "losses=vision_all+logits": ["supervised", "vision_all", "logits"],
        "losses=all": ["supervised", "attention", "vision_all", "vision_focus", "logits"],
        "losses=all-logits": ["supervised", "attention", "vision_all", "vision_focus"],
    }


def test_leave_one_out_is_a_run_for_each_loss_but_labels(plan):
    left_out = ["attention", "vision_all", "vision_focus", "logits"]
    assert [r.name for r in plan("losses=leave-one-out")][1:] == [f"losses=all-{name}" for name in left_out]


def test_every_run_has_a_baseline_on_labels_alone_of_the_same_data_and_seed(plan):
    runs = {run.name: run for run in plan("losses=attention", "data.fraction=0.5,1.0", "train.seed=0,1")}
    assert list(runs)[:4] == [
        "losses=none,data.fraction=0.5,train.seed=0",
        "losses=attention,data.fraction=0.5,train.seed=0",
        "losses=none,data.fraction=1.0,train.seed=0",
        "losses=attention,data.fraction=1.0,train.seed=0",
    ]
    assert len(runs) == 8
    for run in runs.values():
        baseline = runs[run.baseline]
        assert baseline.name == baseline.baseline and list(baseline.config.losses.active()) == ["supervised"]
        assert baseline.config.data == run.config.data and baseline.config.train == run.config.train


def test_a_setting_that_a_run_does_not_use_makes_no_other_run(plan):
    names = [run.name for run in plan("losses=none,logits,all", "losses.attention.distance=kl,mse")]
    assert names == [
        "losses=none",
        "losses=logits",
        "losses=all,losses.attention.distance=kl",
        "losses=all,losses.attention.distance=mse",
    ]


def test_a_setting_varied_alone_is_held_against_labels_alone(plan):
    runs = plan("losses.logits.weight=0.1,1")
    assert [run.name for run in runs] == [
        "losses=none",
        "losses=all,losses.logits.weight=0.1",
        "losses=all,losses.logits.weight=1",
    ]
    assert [run.config.losses.logits.weight for run in runs[1:]] == [0.1, 1]
    assert {run.baseline for run in runs} == {"losses=none"}


def test_nothing_varied_is_the_config_and_its_baseline(plan):
    runs = plan()
    assert [run.name for run in runs] == ["losses=none", "losses=all"]
    assert len(runs[1].config.losses.active()) == 5


def test_one_at_a_time_runs_the_config_and_each_value_beside_it_seed_by_seed(plan):
    vary = ("losses.logits.weight=1,2", "train.seed=0,1", "losses.attention.distance=mse")
    names = [run.name for run in plan(*vary, one_at_a_time=True)]
    assert names == [
        f"losses={variation},train.seed={seed}"
        for seed in (0, 1)
        for variation in (
            "none",
            "all",
            "all,losses.logits.weight=1",
            "all,losses.logits.weight=2",
            "all,losses.attention.distance=mse",
        )
    ]


def test_the_weight_of_the_labels_is_the_baselines_too(plan):
    runs = {run.name: run for run in plan("losses.supervised.weight=0.5,2")}
    assert len(runs) == 4 and all(run.baseline in runs for run in runs.values())
    for run in runs.values():
        weight = run.config.losses.supervised.weight
        assert runs[run.baseline].config.losses.supervised.weight == weight


def test_a_set_in_another_order_is_the_same_set(plan):
    names = [run.name for run in plan("losses=logits+attention,attention+logits")]
    assert names == ["losses=none", "losses=attention+logits"]


def test_a_setting_of_a_loss_that_is_not_there_is_refused(plan):
    with pytest.raises(
        ConfigError,
        match=r"the config has no losses\.attenton; its losses are supervised, attention, vision_all",
    ):
        plan("losses.attenton.weight=1,2")


def test_a_path_in_a_value_makes_no_folder_of_a_name(plan, experiment):
    assert "/" not in plan(f"student.model={experiment.student}")[0].name


def test_an_unknown_loss_set_is_answered_with_the_known_ones(plan):
    with pytest.raises(
        ConfigError,
        match=r"'attn' is no loss set of this config; its losses are attention, vision_all, vision_focus, "
        r"logits, to be joined by \+; or none, all, all-<loss>, leave-one-out",
    ):
        plan("losses=attn")


def test_a_value_that_the_config_refuses_is_told_before_anything_runs(plan):
    with pytest.raises(ConfigError, match=r"losses\.attention\.distance: Input should be 'kl' or 'mse'"):
        plan("losses.attention.distance=l1")


def test_two_values_that_would_share_a_name_are_refused(plan):
    with pytest.raises(ConfigError, match=r"two runs would share the name 'losses=none,output_dir=runs_a'"):
        plan("output_dir=runs/a,runs_a")


def test_a_sweep_without_a_loss_on_labels_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"losses\.supervised is null, but `baseline: true` compares with"):
        plan_runs(lambda more: load_config(experiment.file, ["losses.supervised=null", *more]), {})
