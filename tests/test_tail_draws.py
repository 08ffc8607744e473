"""Draws from the tail: the teacher's own distribution, the same in every run; an unbiased gradient of the full KL."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from unscored import Unscored
from watched import interrupt_in_batch

from cache import Store, summarise
from pipeline.errors import ConfigError
from pipeline.losses.inputs import TeacherTargets
from pipeline.losses.losses import LOSSES, LogitsLoss
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.tail_draws import draw_tail, uniforms
from pipeline.targets.target import TeacherFacts
from pipeline.teacher_cache.teacher import cache_teacher

V, K, A = 40, 4, 6
DRAWS = ["targets.logits.tail_samples=5", "losses.logits.direction=forward"]


def log_probs_of(seed: int, *, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(A, V, generator=generator)).log_softmax(dim=-1)


def targets_of(teacher: torch.Tensor, *, num_draws: int, key: str) -> TeacherTargets:
    top, ids = teacher.topk(K, dim=-1)
    tail = teacher.scatter(1, ids, -math.inf).logsumexp(dim=-1)
    draws = draw_tail(teacher, ids, keys=[key], num_answers=[A], num_draws=num_draws)
    return TeacherTargets(
        top_ids=ids,
        top_log_probs=top,
        tail_log_prob=tail,
        draw_ids=draws,
        draw_log_probs=teacher.gather(1, draws),
    )


def value_and_gradient(
    student: torch.Tensor, teacher: TeacherTargets, **settings
) -> tuple[float, torch.Tensor]:
    logits = student.clone().requires_grad_()
    outputs = Unscored(logits, torch.zeros(len(logits)).long())
    total, _ = LOSSES["logits"].compute(
        outputs.scored(teacher), teacher, None, LogitsLoss(**{"direction": "forward"} | settings)
    )
    [gradient] = torch.autograd.grad(total, logits)
    return float(total.detach()), gradient


def full_kl(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The oracle: forward KL over the whole vocabulary, in float64, differentiated by torch."""
    logits = student.double().requires_grad_()
    total = torch.nn.functional.kl_div(
        logits.log_softmax(dim=-1), teacher.double(), reduction="sum", log_target=True
    )
    [gradient] = torch.autograd.grad(total, logits)
    return float(total.detach()), gradient.float()


STUDENTS = {
    "early": 0.5 * torch.randn(A, V, generator=torch.Generator().manual_seed(5)),
    "late": log_probs_of(0) + 0.3 * torch.randn(A, V, generator=torch.Generator().manual_seed(6)),
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_over_every_token_that_can_be_drawn_value_and_gradient_are_those_of_the_full_kl(student):
    """The expectation itself, no sample of it: each tail token as the one draw, by its probability."""
    teacher = log_probs_of(0)
    value, exact = full_kl(student, teacher)
    known = targets_of(teacher, num_draws=1, key="any")
    tail_ids = teacher.scatter(1, known.top_ids, -math.inf).argsort(dim=-1, descending=True)[:, : V - K]
    shares = teacher.gather(1, tail_ids).double().softmax(dim=-1).float()
    expected, expected_gradient = 0.0, torch.zeros(A, V)
    for position in range(A):  # one position of a batch at a time: the loss is their sum
        for token, share in zip(tail_ids[position], shares[position], strict=True):
            row = slice(position, position + 1)
            ids = token[None, None]
            one = replace(
                known,
                top_ids=known.top_ids[row],
                top_log_probs=known.top_log_probs[row],
                tail_log_prob=known.tail_log_prob[row],
                draw_ids=ids,
                draw_log_probs=teacher[row].gather(1, ids),
            )
            found, gradient = value_and_gradient(student[row], one)
            expected += float(share) * found
            expected_gradient[row] += share * gradient
    assert expected == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(expected_gradient, exact, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_the_mean_gradient_of_many_samples_tends_to_the_exact_one_and_is_nearer_than_the_bucket(student):
    """400 keys of 16 draws: the mean's error is within twice what it is expected to be, a 20th of a single one's."""
    teacher = log_probs_of(0)
    _, exact = full_kl(student, teacher)
    targets = [targets_of(teacher, num_draws=16, key=f"sample {n}") for n in range(400)]
    gradients = torch.stack([value_and_gradient(student, drawn)[1] for drawn in targets])
    of_mean, of_each = (gradients.mean(dim=0) - exact).norm(), (gradients - exact).norm(dim=(1, 2))
    assert float(of_mean) <= 2 * float(of_each.square().mean().sqrt()) / math.sqrt(400)
    _, of_bucket = value_and_gradient(student, targets[0], tail="bucket")
    assert float(of_mean) < 0.5 * float((of_bucket - exact).norm())


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_with_many_draws_it_is_nearer_than_the_bucket_alone_which_stays_where_it_is(student):
    teacher = log_probs_of(0)
    value, exact = full_kl(student, teacher)

    def distance(num_draws: int, **settings) -> float:
        targets = targets_of(teacher, num_draws=num_draws, key="any")
        return float((value_and_gradient(student, targets, **settings)[1] - exact).norm() / exact.norm())

    of_bucket = distance(4, tail="bucket")
    assert of_bucket == pytest.approx(distance(4096, tail="bucket"))
    assert distance(65536) < distance(1024) < of_bucket and distance(65536) < 0.25 * of_bucket
    bucket_value, _ = value_and_gradient(student, targets_of(teacher, num_draws=4, key="any"), tail="bucket")
    assert bucket_value < 0.9 * value  # a bucket sees less of the difference, by the chain rule


def test_at_the_teacher_any_draws_give_zero_and_no_gradient():
    teacher = log_probs_of(0)
    for num_draws in (1, 7):
        value, gradient = value_and_gradient(teacher, targets_of(teacher, num_draws=num_draws, key="any"))
        assert abs(value) < 1e-5 and float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"direction": "reverse"},
        {"direction": "jsd"},
        {"temperature": 2.0},
        {"tail": "bucket"},
    ],
    ids=str,
)
def test_what_draws_do_not_estimate_is_told_by_the_bucket(settings):
    teacher, student = targets_of(log_probs_of(0), num_draws=16, key="any"), STUDENTS["early"]
    without = replace(teacher, draw_ids=None, draw_log_probs=None)
    found, alone = (value_and_gradient(student, targets, **settings) for targets in (teacher, without))
    assert found[0] == alone[0] and torch.allclose(found[1], alone[1], rtol=1e-6, atol=1e-9)  # sums' order
    assert value_and_gradient(student, teacher)[0] != value_and_gradient(student, without)[0]


def test_certain_students_and_teachers_stay_finite():
    certain = torch.zeros(A, V)
    certain[:, 0] = 500.0
    for ours, theirs in ((certain, -certain), (-certain, certain), (certain, certain)):
        teacher = targets_of(theirs.log_softmax(dim=-1), num_draws=5, key="any")
        stored = replace(
            teacher,
            top_log_probs=teacher.top_log_probs.clamp(min=-30),
            tail_log_prob=teacher.tail_log_prob.clamp(min=-30),
            draw_log_probs=teacher.draw_log_probs.clamp(min=-30),
        )
        value, gradient = value_and_gradient(ours, stored)
        assert math.isfinite(value) and gradient.isfinite().all()


# The draws themselves


def test_draws_follow_the_teacher_outside_its_top_k():
    """20,000 draws: Pearson's chi-squared of 35 degrees of freedom is below 80; chance passes that once in 40,000."""
    teacher = log_probs_of(1)[:1]
    ids = teacher.topk(K, dim=-1).indices
    draws = draw_tail(teacher, ids, keys=["any"], num_answers=[1], num_draws=20_000)
    counts = torch.bincount(draws[0], minlength=V).double()
    expected = 20_000 * teacher.double().scatter(1, ids, -math.inf).softmax(dim=-1)[0]
    assert not counts[ids[0]].any()
    is_tail = expected > 0
    chi_squared = float(((counts - expected)[is_tail].square() / expected[is_tail]).sum())
    assert int(is_tail.sum()) == V - K and chi_squared < 80


def test_draws_ascend_and_depend_on_key_and_position_alone():
    teacher = log_probs_of(1)
    ids = teacher.topk(K, dim=-1).indices
    together = draw_tail(teacher, ids, keys=["a", "b", "c"], num_answers=[1, 0, 5], num_draws=8)
    alone = draw_tail(teacher[1:], ids[1:], keys=["c"], num_answers=[5], num_draws=8)
    assert torch.equal(together[1:], alone) and (together.diff(dim=1) >= 0).all()
    assert not torch.equal(alone, draw_tail(teacher[1:], ids[1:], keys=["d"], num_answers=[5], num_draws=8))


def test_the_uniforms_of_a_key_are_written_down():
    """Another version of a library must not draw anew: a store would then not be that of an undisturbed run."""
    written_down = [[0.887051185243763, 0.9154840154806152], [0.5297860499704257, 0.8003037691814825]]
    np.testing.assert_allclose(uniforms("sample", 2, 2), written_down, rtol=0, atol=1e-12)
    many = uniforms("another", 100, 100)
    assert many.min() > 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.015


# In a store


@pytest.fixture(scope="module")
def drawn(experiment, tmp_path_factory):
    """A store with draws, and its config."""
    folder = tmp_path_factory.mktemp("drawn")
    config = experiment.config(folder, f"cache.path={folder}/store", *DRAWS)
    cache_teacher(config)
    return config


def test_the_store_is_the_same_whatever_its_making_was_disturbed_by(drawn, experiment, tmp_path):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", *DRAWS)
    with interrupt_in_batch(3), pytest.raises(KeyboardInterrupt):  # in the second shard
        cache_teacher(config)
    cache_teacher(config)
    assert summarise(tmp_path / "store").content == summarise(drawn.one_cache.path).content


def test_a_sample_draws_the_same_in_batches_of_another_size(drawn, experiment, tmp_path):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", "teacher.batch_size=1", *DRAWS)
    cache_teacher(config)
    alone, together = Store(config.one_cache.path), Store(drawn.one_cache.path)
    names = ["logits/draw_ids", "logits/draw_log_probs"]
    assert sorted(alone.keys()) == sorted(together.keys())
    for key in together.keys():  # noqa: SIM118
        mine, theirs = alone.read(key, names), together.read(key, names)
        assert np.array_equal(mine[names[0]], theirs[names[0]]) and mine[names[0]].shape[1] == 5
        np.testing.assert_allclose(mine[names[1]], theirs[names[1]], atol=0.01)


def test_info_and_manifest_say_what_draws_are_and_how_exact(drawn):
    arrays = {array.name: array for array in summarise(drawn.one_cache.path).arrays}
    assert arrays["logits/draw_ids"].stated_error == "exact (uint16)"
    assert arrays["logits/draw_log_probs"].stated_error.startswith("|error| <= 2^-11 |v|")
    assert Store(drawn.one_cache.path).manifest.capture["targets"]["logits"] == {
        "top_k": 8,
        "tail_samples": 5,
    }


# Beside what was there


def test_a_setting_at_its_default_leaves_stores_and_runs_of_before_as_they_are(experiment):
    assert LogitsTarget().model_dump() == {"top_k": 32}
    assert "step" not in AttentionTarget().model_dump() and "tail" not in LogitsLoss().model_dump()
    assert "logits/draw_ids" not in Store(experiment.store).manifest.specs


def test_draws_outside_the_whole_vocabulary_are_refused():
    facts = TeacherFacts("some/teacher", num_layers=4, num_heads=4, hidden_size=32, vocab_size=96)
    with pytest.raises(
        ConfigError, match=r"asks for 3 draws outside the top 96, but that is the whole vocabulary"
    ):
        LogitsTarget(top_k=100, tail_samples=3).arrays(facts)
