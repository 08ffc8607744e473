"""Reinforcement learning of the pruning head: the draws, the rewards, what is trained, and that it resumes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_experiment import Experiment, log_of, losses_of_steps
from test_resume import TEN_STEPS
from test_twig_distillation import LOSSES, OF_BASE, PLACE
from test_twig_training import assert_same, assert_same_run, tensors
from twig_experiment import twig_experiment
from twig_models import FAMILIES, TwigSpecimen, made_once, oracle_logits
from watched import train_until

from pipeline.config.config import Config
from pipeline.errors import ConfigError
from pipeline.losses.inputs import Actions, StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES as TABLE
from pipeline.positions import IGNORE_INDEX, Slots
from pipeline.targets.vocabulary import score_answers
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.reinforcing.exploring import Exploring
from pipeline.twig.reinforcing.ranking import LOWEST, draw_rankings, log_probability, log_shares
from pipeline.twig.reinforcing.reward import PrunedBase
from pipeline.twig.training.train import train_twig

pytestmark = pytest.mark.slow

SHARES = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.25, 0.0]])
REAL = torch.tensor([[True] * 4, [True] * 3 + [False]])


# Draws


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_probabilities_of_all_ordered_choices_add_up_to_one(count):
    for shares, real in zip(SHARES, REAL, strict=True):
        logs = log_shares(shares[None].double(), real[None])
        every = list(itertools.permutations(range(4)))
        probs = log_probability(logs, torch.tensor([every]), torch.tensor([count]))[0].exp()
        of_choice = {tuple(order[:count]): float(p) for order, p in zip(every, probs, strict=True)}
        assert sum(of_choice.values()) == pytest.approx(1, abs=1e-9)
        # One after another, by hand.
        for choice, found in of_choice.items():
            expected, left = 1.0, 1.0
            for token in choice:
                expected, left = (
                    expected * float(shares[token]) / left if left else 0.0,
                    left - float(shares[token]),
                )
            assert found == pytest.approx(expected, abs=1e-7)


def test_the_gradient_is_that_of_finite_differences():
    scores = torch.tensor([[0.2, -0.5, 1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    ranking, counts = torch.tensor([[[2, 0, 3, 1], [1, 3, 2, 0]]]), torch.tensor([2])

    def value(raw: torch.Tensor) -> torch.Tensor:
        return log_probability(
            log_shares(raw.softmax(dim=1), torch.ones(1, 4, dtype=torch.bool)), ranking, counts
        )

    assert torch.autograd.gradcheck(value, (scores,))


def test_draws_have_these_probabilities_and_never_hold_what_cannot_be_drawn():
    torch.manual_seed(0)
    logs = log_shares(SHARES, REAL)
    drawn = draw_rankings(logs, 20_000)
    assert drawn.sort(dim=2).values.equal(torch.arange(4).expand(2, 20_000, 4))
    assert bool((drawn[1, :, 3] == 3).all())
    pairs = list(itertools.permutations(range(4), 2))
    for of_sample, shares in zip(drawn, SHARES, strict=True):
        found = torch.tensor(
            [float(((of_sample[:, 0] == a) & (of_sample[:, 1] == b)).sum()) for a, b in pairs]
        )
        expected = torch.tensor([20_000 * float(shares[a] * shares[b] / (1 - shares[a])) for a, b in pairs])
        real = expected > 0
        statistic = float(((found - expected)[real].square() / expected[real]).sum())
        assert statistic < 35 and not found[~real].any()  # 11 degrees of freedom: once in 4,000


def test_a_choice_of_all_tokens_has_finite_gradients():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)  # after a softmax that is sure
    real = torch.tensor([[True, True, True, False]])
    logs = log_shares(scores, real)
    assert float(logs[0, 3].detach()) == LOWEST
    log_probability(logs, torch.tensor([[[0, 1, 2, 3]]]), torch.tensor([3])).sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


# Rewards


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> Callable[[str], TwigSpecimen]:
    return made_once(tmp_path_factory.mktemp)


def teacher_forced(one: TwigSpecimen, geometry: Geometry, chosen: list[int]):
    """Return hidden states, the layers' inputs and a batch, padded on the right, as a training has them."""
    batch = one.specimen.batch(chosen)
    inputs = one.specimen.vlm.inputs(batch, one.specimen.features(chosen))
    recorded = LayerInputs.record(one.base.network, inputs)
    states = one.base.network(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    return states[geometry.attach_layer], recorded, batch


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
@torch.no_grad()
def test_without_pruning_the_reward_is_the_bases_own_log_probability(family, specimens):
    one, geometry = specimens(family), Geometry(1, 2, 6, 6)
    chosen = list(range(one.num_prompts))
    hidden, recorded, batch = teacher_forced(one, geometry, chosen)
    every = [batch["is_vision"][b].nonzero()[None, :, 0] for b in chosen]
    found = PrunedBase(one.base, geometry).rewards(hidden, recorded, batch, every)
    logits = one.base.network(
        **one.specimen.vlm.inputs(batch, one.specimen.features(chosen)), use_cache=False
    ).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    for b in chosen:
        real = labels[b] != IGNORE_INDEX
        own = score_answers(logits[b][real], labels[b][real]).label.mean()
        torch.testing.assert_close(found[b], own[None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
@torch.no_grad()
def test_the_reward_of_a_choice_is_the_log_probability_under_the_base_that_sees_no_other_token(
    family, specimens
):
    one, geometry = specimens(family), Geometry(2, 2, 4, 6)
    chosen = [n for n in range(one.num_prompts) if bool(one.prompts([n]).is_vision.any())]
    hidden, recorded, batch = teacher_forced(one, geometry, chosen)
    kept, expected = [], []
    for place, number in enumerate(chosen):
        prompts = one.prompts([number])
        sites = batch["is_vision"][place].nonzero()[:, 0]
        last = prompts.length - 1
        sites = sites[sites <= last]
        choices = torch.stack([sites[torch.randperm(len(sites))[:3]] for _ in range(4)])
        kept.append(choices)
        length = int(batch["attention_mask"][place].sum())
        ids, labels = batch["input_ids"][place, :length], batch["labels"][place, :length]
        assert torch.equal(ids[: prompts.length], prompts.inputs["input_ids"][0])
        real = labels[prompts.length :] != IGNORE_INDEX
        for choice in choices:
            is_kept = torch.zeros(prompts.length, dtype=torch.bool)
            is_kept[choice] = True
            tokens = ids[prompts.length :].tolist()
            logits = oracle_logits(one.base, prompts, tokens[:-1], is_kept, geometry)[last:]
            own = logits.log_softmax(dim=1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            expected.append(own[real].mean())
    whole = [torch.equal(batch["labels"][p] != IGNORE_INDEX, _last_answer(batch, p, one, n))
             for p, n in enumerate(chosen)]  # fmt: skip
    found = PrunedBase(one.base, geometry).rewards(hidden, recorded, batch, kept)
    of_oracle = torch.stack(expected).view(len(chosen), 4)
    compared = torch.tensor(whole)
    assert bool(compared.any())
    torch.testing.assert_close(found[compared], of_oracle[compared], atol=2e-5, rtol=1e-4)
    assert bool((found[compared].std(dim=1) > 0).all())


def _last_answer(batch: dict, place: int, one: TwigSpecimen, number: int) -> torch.Tensor:
    """Return where the labels of the last answer alone are, bool 'S': the oracle knows no other."""
    labels = batch["labels"][place] != IGNORE_INDEX
    after = torch.arange(len(labels)) >= one.prompts([number]).length
    return labels & after


@torch.no_grad()
def test_a_base_that_adds_image_features_to_its_layers_is_refused(specimens):
    one, geometry = specimens("qwen3_vl"), Geometry(0, 2, 4, 6)
    hidden, recorded, batch = teacher_forced(one, geometry, [0])
    with pytest.raises(
        ConfigError, match=r"losses.policy: the base adds features .* set twig.attach_layer to \d"
    ):
        PrunedBase(one.base, geometry).rewards(hidden, recorded, batch, [torch.zeros(1, 0).long()])


@torch.no_grad()
def test_budgets_are_all_alike_at_first_and_the_smallest_at_the_end(specimens):
    one = specimens("mobilevlm")
    exploring = Exploring(PrunedBase(one.base, Geometry(1, 2, 5, 6)), [0.5, 1 / 3, 0.4], group=2, annealing=8)
    torch.manual_seed(0)
    shares = {progress: [exploring._drawn_share(progress) for _ in range(300)] for progress in (0.0, 1.0)}
    counts = [shares[0.0].count(share) for share in (1 / 3, 0.4, 0.5)]
    assert min(counts) > 70 and sum(counts) == 300
    assert shares[1.0].count(1 / 3) >= 297


# The loss


def loss_of(log_probs: torch.Tensor, rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = torch.zeros(len(rewards))
    none = torch.zeros(0, 0).long()
    student = StudentOutputs(
        scores=score_answers(torch.zeros(0, 8), torch.zeros(0).long()),
        slots=Slots(none, none),
        asks=torch.tensor([True, False])[: len(rewards)],
        actions=Actions(log_probs, rewards, nothing, nothing),
    )
    row = TABLE["policy"]
    return row.compute(student, TeacherTargets(), None, row.settings())


def test_the_loss_raises_what_was_rewarded_more_and_counts_samples_that_ask():
    log_probs = torch.zeros(2, 3, requires_grad=True)
    total, count = loss_of(log_probs, torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]]))
    total.backward()
    assert float(count) == 1 and log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad, torch.tensor([[1 / 3, 0, -1 / 3], [0, 0, 0]]))
    alike, _ = loss_of(torch.randn(1, 4), torch.full((1, 4), -0.5))
    assert float(alike) == 0
    single, _ = loss_of(torch.randn(1, 1), torch.tensor([[-0.5]]))
    assert float(single) == 0.5


# The training

REINFORCING = ["losses={policy: {group: 6, keep: [0.4, 0.5]}, supervised: null}", "train.learning_rate=3e-2"]


@pytest.fixture(scope="module")
def stage_1(experiment, tmp_path_factory) -> tuple[Experiment, Path]:
    """A twig with a pruning head, and the experiment that it was trained in."""
    folder = tmp_path_factory.mktemp("stage_1")
    small = twig_experiment(experiment, folder, twig=PLACE, targets=OF_BASE, more=LOSSES)
    return small, train_twig(small.config(folder), folder / "run")


def policy_config(stage_1: tuple[Experiment, Path], tmp_path: Path, *more: str) -> Config:
    small, twig = stage_1
    return small.config(tmp_path, *REINFORCING, f"twig.first_weights={twig}", *more)


def test_only_the_pruning_head_is_trained_and_reward_entropy_and_overlap_are_logged(stage_1, tmp_path):
    train_twig(policy_config(stage_1, tmp_path, "train.max_steps=10"), tmp_path / "run")
    before, after = tensors(stage_1[1].parent), tensors(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"pruning_head.query.weight", "pruning_head.key.weight"}
    steps = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert len(steps) == 10
    for step in steps:
        assert step["policy/reward"] < 0 and 0 < step["policy/entropy"] < math.log(16)
        assert 0 <= step["policy/overlap"] <= 1 and "loss/policy" in step


def test_the_reward_of_what_is_kept_rises(stage_1, tmp_path):
    small, _ = stage_1
    more = [f"data.held_out_shards={small.shard(0)}", "train.eval_strategy=epoch", "train.max_steps=60"]
    train_twig(policy_config(stage_1, tmp_path, *more, "losses.policy.group=32"), tmp_path / "run")
    entries = log_of(tmp_path / "run")
    held_out = [entry for entry in entries if "eval_policy" in entry]
    assert len(held_out) >= 3
    # The held-out loss is minus the reward of the tokens with the largest scores.
    assert all(one["eval_policy"] == pytest.approx(-one["eval_policy/reward"], rel=1e-5) for one in held_out)
    rewards = [entry["policy/reward"] for entry in entries if "loss" in entry]
    assert sum(rewards[-10:]) > sum(rewards[:10])


def test_a_stopped_training_goes_on_as_if_it_had_not(stage_1, tmp_path):
    config = policy_config(stage_1, tmp_path, *TEN_STEPS)
    train_twig(config, tmp_path / "whole")
    train_until(4, config, tmp_path / "run", train=train_twig)
    train_twig(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_an_anchor_keeps_the_scores_near_the_bases_attention(stage_1, tmp_path):
    config = policy_config(stage_1, tmp_path, "losses.query_attention={weight: 1.0}")
    train_twig(config, tmp_path / "run")
    assert {"loss/policy", "loss/query_attention"} <= losses_of_steps(tmp_path / "run")[0].keys()


def test_it_stops_early_and_keeps_the_best(stage_1, tmp_path):
    small, _ = stage_1
    held_out = [f"data.held_out_shards={small.shard(0)}", "train.eval_strategy=steps", "train.eval_steps=1"]
    held_out += ["train.save_strategy=steps", "train.save_steps=1", "train.load_best_model_at_end=true"]
    # No step is better than the first with a learning rate of zero.
    more = ["train.max_steps=30", "train.learning_rate=0", "losses.policy.patience=2"]
    config = policy_config(stage_1, tmp_path, *held_out, *more)
    train_twig(config, tmp_path / "run")
    assert max(entry["step"] for entry in log_of(tmp_path / "run")) == 3
    assert_same(tensors(tmp_path / "run"), tensors(stage_1[1].parent))
    assert (
        train_twig(config, tmp_path / "run") == tmp_path / "run" / "twig"
    )  # finished: nothing is done again
    # A resumed training has the patience that was left.
    again = policy_config(stage_1, tmp_path, *held_out, *more, "train.resume_from_checkpoint=true")
    train_until(2, again, tmp_path / "again", train=train_twig)
    train_twig(again, tmp_path / "again")
    assert max(entry["step"] for entry in log_of(tmp_path / "again")) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["twig.first_weights=copy"], r"losses.policy continues the pruning head of a trained twig; set twig.pru"),
        (["twig.pruning_head=false"], r"losses.policy continues the pruning head"),
        (["losses.supervised={}"], r"losses.supervised trains what losses.policy leaves as it is; set it to null"),
        (["twig.lora={rank: 2}"], r"losses.policy trains the pruning head alone; remove twig.lora"),
        (["losses.policy.patience=2"], r"losses.policy.patience stops after held-out losses .*load_best_model_at"),
        (["losses.policy.group=1"], r"losses.policy.group: .* greater than or equal to 2"),
    ],
)  # fmt: skip
def test_sections_that_do_not_go_together_are_refused(overrides, message, stage_1, tmp_path):
    with pytest.raises(ConfigError, match=message):
        policy_config(stage_1, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["losses.policy.keep=[0.1]"], r"losses.policy.keep: 0.1 of 4 vision tokens asked for"),
        # A share is refused before the first step, also if it would hardly ever be drawn.
        (
            ["losses.policy.keep=[0.4, 0.99]", "losses.policy.annealing=1e9"],
            r"^losses.policy.keep: 0.99 of 4 .* between$",
        ),
        (["twig.wipe_layer=3"], r"twig.first_weights: .* is a twig at .*wipe_layer=2.* one at .*wipe_layer=3"),
        (["twig.first_weights=nowhere"], r"nowhere: no config.json; name a folder that `alignkd twig train` wrote"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_twig_is_refused(overrides, message, stage_1, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_twig(policy_config(stage_1, tmp_path, *overrides), tmp_path / "run")
