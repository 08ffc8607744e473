"""Every loss against its formula, written a second time: in float64, sample by sample, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from unscored import Unscored

from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.inputs import TeacherTargets
from pipeline.losses.losses import (
    LOSSES,
    AttentionLoss,
    LogitsLoss,
    SupervisedLoss,
    VisionAllLoss,
    VisionFocusLoss,
)
from pipeline.positions import Slots

# Two samples: text rows 4 and 2, images 1 and 2, of several sizes; the slots' values matter only where they are -1.
SLOTS = Slots(
    text=torch.tensor([[5, 6, 7, 8], [9, 10, -1, -1]]),
    vision=torch.tensor([[1, 2, 3, -1, -1, -1], [1, 2, 3, 4, 5, 6]]),
    sizes=(3, 2, 4),
)
SIZES = ((4, 3), (2, 6))  # text rows and vision columns of each sample


def random_attention(num_heads: int, *, seed: int) -> torch.Tensor:
    """Rows over J columns and a rest, as a softmax leaves them; zero where padded: 'B H T J'."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.zeros(2, num_heads, 4, 6)
    for sample, (rows, columns) in enumerate(SIZES):
        scores = 2 * torch.randn(num_heads, rows, columns + 1, generator=generator)
        attention[sample, :, :rows, :columns] = scores.softmax(dim=-1)[..., :-1]
    return attention


def student_with(**changes) -> Unscored:
    """Outputs with labels for as many answers as there are logits of."""
    logits = changes.pop("answer_logits", torch.zeros(0, 5))
    defaults = {"answer_labels": torch.zeros(len(logits), dtype=torch.long), "slots": SLOTS}
    return Unscored(answer_logits=logits, **defaults | changes)


def mean_of(name, student, teacher, settings, head=None) -> float:
    total, count = LOSSES[name].compute(student.scored(teacher), teacher, head, settings)
    return float(total.detach() / count)


def with_rest(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, 1 - rows.sum(dim=-1, keepdim=True)], dim=-1).double()


def test_supervised_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, 0.0, 0.0]])
    student = student_with(answer_logits=logits, answer_labels=torch.tensor([2, 0]))
    mean = mean_of("supervised", student, TeacherTargets(), SupervisedLoss())
    assert mean == pytest.approx((math.log(4) + math.log(2)) / 2)


@pytest.mark.parametrize("heads", ["mean", "mix"])
def test_attention_kl(heads):
    student, teacher = random_attention(2, seed=0), random_attention(4, seed=1)
    mixer = HeadMixer(1, 4, 2)
    torch.nn.init.normal_(mixer.scores, std=2)
    weights = mixer.scores.detach()[0].softmax(dim=-1)
    mixed = [sum(weights[s, h] * teacher[:, h] for h in range(4)) for s in range(2)]
    mine, theirs = student, torch.stack(mixed, dim=1)
    if heads == "mean":
        mine, theirs = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    rows = [
        F.kl_div(
            with_rest(mine[b, h, t, :columns]).log(),
            with_rest(theirs[b, h, t, :columns]),
            reduction="sum",
        )
        for b, (num_rows, columns) in enumerate(SIZES)
        for h in range(mine.shape[1])
        for t in range(num_rows)
    ]
    found = mean_of(
        "attention",
        student_with(attention={0: student}),
        TeacherTargets(attention={0: teacher}),
        AttentionLoss(heads=heads),
        mixer,
    )
    assert len(rows) == 6 * mine.shape[1]
    assert found == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


def test_attention_kl_by_hand():
    """One row, one column: two buckets, one half against one quarter."""
    slots = Slots(text=torch.tensor([[2]]), vision=torch.tensor([[1]]))
    student = student_with(slots=slots, attention={0: torch.full((1, 1, 1, 1), 0.25)})
    teacher = TeacherTargets(attention={0: torch.full((1, 1, 1, 1), 0.5)})
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert mean_of("attention", student, teacher, AttentionLoss()) == pytest.approx(by_hand)


def test_attention_mse_is_the_published_mean_over_heads_rows_and_columns():
    slots = Slots(text=SLOTS.text[:1], vision=SLOTS.vision[:1, :3])
    student, teacher = random_attention(2, seed=0)[:1, :, :, :3], random_attention(4, seed=1)[:1, :, :, :3]
    mixer = HeadMixer(1, 4, 2)
    torch.nn.init.normal_(mixer.scores)
    mixed = torch.einsum("sh,bhtj->bstj", mixer.scores.detach()[0].softmax(dim=-1), teacher)
    found = mean_of(
        "attention",
        student_with(slots=slots, attention={0: student}),
        TeacherTargets(attention={0: teacher}),
        AttentionLoss(distance="mse", heads="mix"),
        mixer,
    )
    assert found == pytest.approx(float((mixed - student).double().square().mean()), rel=1e-5)


def test_pairs_of_layers_count_as_rows_of_their_own():
    student = {0: random_attention(2, seed=0), 2: random_attention(2, seed=2)}
    teacher = {1: random_attention(2, seed=1), 3: random_attention(2, seed=3)}
    one_by_one = [
        mean_of(
            "attention",
            student_with(attention=student),
            TeacherTargets(attention=teacher),
            AttentionLoss(layers=[pair]),
        )
        for pair in ((1, 0), (3, 2))
    ]
    both = mean_of(
        "attention",
        student_with(attention=student),
        TeacherTargets(attention=teacher),
        AttentionLoss(layers=[(1, 0), (3, 2)]),
    )
    assert both == pytest.approx(sum(one_by_one) / 2, rel=1e-5)


def test_probabilities_of_zero_and_one_stay_finite():
    certain, none = torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6)
    certain[..., 0] = 1
    for ours, theirs in ((certain, none), (none, certain)):
        ours = ours.clone().requires_grad_()
        student, teacher = student_with(attention={0: ours}), TeacherTargets(attention={0: theirs})
        total, _ = LOSSES["attention"].compute(student.scored(teacher), teacher, None, AttentionLoss())
        total.backward()
        assert total.isfinite() and ours.grad.isfinite().all()


def test_vision_all_is_the_mean_square_of_each_image_to_the_mapped_teacher():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, width, generator=generator) for width in (4, 6))
    head = VisionMap(6, 4)
    mapped = teacher.double() @ head.weight.detach().double().T + head.bias.detach().double()
    squares = (student.double() - mapped).square()
    of_images = [float(squares[image].mean()) for image in (slice(0, 3), slice(3, 5), slice(5, 9))]
    found = mean_of(
        "vision_all", student_with(vision=student), TeacherTargets(vision=teacher), VisionAllLoss(), head
    )
    assert found == pytest.approx(sum(of_images) / 3, rel=1e-5)


def test_vision_focus_is_the_same_on_the_tokens_that_text_attends_most():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 4, generator=generator) for _ in range(2))
    attention = random_attention(3, seed=4)
    # Image 0 is all of sample 0's columns, images 1 and 2 share sample 1's. Only the last has more than 3 tokens.
    blocks = [attention[0, :, :4, :3], attention[1, :, :2, :2], attention[1, :, :2, 2:]]
    means = []
    for first, block in zip((0, 3, 5), blocks, strict=True):
        scores = block.double().mean(dim=0).sum(dim=0).tolist()
        chosen = [first + token for token in sorted(range(len(scores)), key=lambda t: -scores[t])[:3]]
        means.append((student[chosen] - teacher[chosen]).double().square().mean())
    found = mean_of(
        "vision_focus",
        student_with(vision=student),
        TeacherTargets(vision=teacher, attention={1: attention}),
        VisionFocusLoss(k=3, layer=1),
        VisionMap(4, 4),
    )
    assert found == pytest.approx(float(torch.stack(means).mean()), rel=1e-5)


def test_a_focus_on_all_tokens_is_vision_all():
    student, teacher = torch.randn(9, 4), torch.randn(9, 4)
    outputs, head = student_with(vision=student), VisionMap(4, 4)
    targets = TeacherTargets(vision=teacher, attention={0: random_attention(2, seed=0)})
    focus = mean_of("vision_focus", outputs, targets, VisionFocusLoss(k=100), head)
    assert focus == pytest.approx(mean_of("vision_all", outputs, targets, VisionAllLoss(), head), rel=1e-5)


def kept(logits: torch.Tensor, top_k: int) -> TeacherTargets:
    """What the store keeps of logits."""
    log_probs = logits.log_softmax(dim=-1)
    top, ids = log_probs.topk(top_k, dim=-1)
    tail = (1 - top.exp().sum(dim=-1)).clamp(min=1e-13).log()
    return TeacherTargets(top_ids=ids, top_log_probs=top, tail_log_prob=tail)


def logits_pair():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(6, 12, generator=generator) for _ in range(2))


def divergence(direction: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean over rows of float64 probabilities, by torch's own kl_div(log q, p) = KL(p || q)."""
    if direction == "jsd":
        middle = (ours + theirs) / 2
        return (divergence("reverse", ours, middle) + divergence("reverse", theirs, middle)) / 2
    p, q = (ours, theirs) if direction == "reverse" else (theirs, ours)
    return F.kl_div(q.log(), p, reduction="batchmean")


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_logits_over_the_whole_vocabulary_are_the_textbook_divergence(direction, temperature):
    student, teacher = logits_pair()
    found = mean_of(
        "logits",
        student_with(answer_logits=student),
        kept(teacher, 12),
        LogitsLoss(direction=direction, temperature=temperature),
    )
    ours, theirs = ((x.double() / temperature).softmax(dim=-1) for x in (student, teacher))
    assert found == pytest.approx(temperature**2 * float(divergence(direction, ours, theirs)), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_logits_of_the_top_k_are_compared_with_all_the_rest_as_one(direction, temperature):
    student, teacher = logits_pair()
    targets = kept(teacher, 4)
    found = mean_of(
        "logits",
        student_with(answer_logits=student),
        targets,
        LogitsLoss(direction=direction, temperature=temperature),
    )
    buckets = []
    for logits in (student, teacher):
        top = logits.double().softmax(dim=-1).gather(1, targets.top_ids)
        tempered = with_rest(top) ** (1 / temperature)
        buckets.append(tempered / tempered.sum(dim=-1, keepdim=True))
    assert found == pytest.approx(temperature**2 * float(divergence(direction, *buckets)), rel=1e-4)


def test_the_directions_differ_and_jensen_shannon_is_symmetric_and_bounded():
    student, teacher = logits_pair()
    values = {
        (direction, order): mean_of(
            "logits", student_with(answer_logits=a), kept(b, 12), LogitsLoss(direction=direction)
        )
        for direction in ("reverse", "forward", "jsd")
        for order, (a, b) in enumerate(((student, teacher), (teacher, student)))
    }
    assert values["reverse", 0] == pytest.approx(values["forward", 1], rel=1e-4)
    assert values["reverse", 0] != pytest.approx(values["forward", 0], rel=1e-2)
    assert values["jsd", 0] == pytest.approx(values["jsd", 1], rel=1e-4)
    assert 0 < values["jsd", 0] < math.log(2)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_certain_students_and_teachers_stay_finite(direction):
    certain = torch.zeros(2, 12)
    certain[:, 0] = 500.0
    for ours, theirs in ((certain, -certain), (-certain, certain), (certain, certain)):
        ours = ours.clone().requires_grad_()
        student = student_with(answer_logits=ours)
        total, _ = LOSSES["logits"].compute(
            student.scored(kept(theirs, 4)), kept(theirs, 4), None, LogitsLoss(direction=direction)
        )
        total.backward()
        assert total.isfinite() and ours.grad.isfinite().all()


def test_half_precision_inputs_are_summed_in_float32():
    student, teacher = logits_pair()
    outputs = student_with(answer_logits=student.bfloat16(), answer_labels=torch.arange(6))
    for name, settings in (("supervised", SupervisedLoss()), ("logits", LogitsLoss())):
        total, _ = LOSSES[name].compute(outputs.scored(kept(teacher, 4)), kept(teacher, 4), None, settings)
        exact = student_with(answer_logits=student.bfloat16().float(), answer_labels=torch.arange(6))
        wanted, _ = LOSSES[name].compute(exact.scored(kept(teacher, 4)), kept(teacher, 4), None, settings)
        assert total.dtype == torch.float32 and torch.equal(total, wanted)


def test_a_mixture_of_heads_stays_a_distribution():
    mixer = HeadMixer(2, 4, 3)
    torch.nn.init.normal_(mixer.scores, std=3)
    attention = with_rest(random_attention(4, seed=0)).float()
    for pair in (0, 1):
        mixed = mixer(attention, pair)
        assert mixed.shape == (2, 3, 4, 7) and (mixed >= 0).all()
        torch.testing.assert_close(mixed.sum(dim=-1), torch.ones(2, 3, 4))
    assert not torch.equal(mixer(attention, 0), mixer(attention, 1))


def test_a_new_mixer_is_the_mean_of_heads_and_a_new_map_between_equal_widths_the_identity():
    attention = random_attention(4, seed=0)
    mean = attention.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(HeadMixer(1, 4, 3)(attention, 0), mean)
    features = torch.randn(9, 4)
    assert torch.equal(VisionMap(4, 4)(features), features)
    assert VisionMap(6, 4)(torch.zeros(9, 6)).abs().max() == 0
