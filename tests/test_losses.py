"""What every loss must be: zero at the teacher, blind to padding, a sum with a count, and about the right tensors.

Every row of LOSSES is tested, with its default settings where SETTINGS has none.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from unscored import Unscored

from pipeline.losses.heads import HeadMixer, VisionMap
from pipeline.losses.inputs import Actions, TeacherTargets
from pipeline.losses.losses import (
    LOSSES,
    AttentionLoss,
    LogitsLoss,
    VisionFocusLoss,
    focus_tokens,
)
from pipeline.losses.of_twigs import PredictionLoss
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX, Counts
from pipeline.targets.tail_draws import draw_tail
from pipeline.targets.targets import TARGETS

SETTINGS = {
    "attention": [
        AttentionLoss(distance=distance, heads=heads, layers=layers)
        for distance in ("kl", "mse")
        for heads, layers in (("mean", [(0, 0)]), ("mix", [(0, 0)]), ("mix", [(0, 0), (1, 1)]))
    ],
    "vision_focus": [VisionFocusLoss(k=2), VisionFocusLoss(k=16, layer=1)],
    "prediction": [PredictionLoss(), PredictionLoss(temperature=1.0, clip=None), PredictionLoss(clip=0.2)],
    "logits": [
        LogitsLoss(direction=direction, temperature=temperature)
        for direction in ("reverse", "forward", "jsd")
        for temperature in (1.0, 4.0)
    ]
    + [LogitsLoss(direction="forward", tail="bucket")],
}
CASES = [
    pytest.param(name, settings, id=f"{name}-{settings}")
    for name, row in LOSSES.items()
    for settings in SETTINGS.get(name, [row.settings()])
]
DISTILLING = [case for case in CASES if LOSSES[case.values[0]].targets]
LAYOUTS = {
    "images": ([3, IMAGE, 5], [12, IMAGE, 3]),
    "several images": ([IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3], [1, IMAGE, 6]),
    "with text alone": ([3, IMAGE, 5], [6], [2, IMAGE, 9], [11]),
    "an image at the end": ([3, IMAGE, 2, IMAGE], [5, IMAGE], [3, IMAGE, 5]),
}
# At the teacher: logits also with a top K that is the whole vocabulary.
ZERO = [
    pytest.param(*case.values, top_k, id=f"{case.id}-top_{top_k}")
    for case in DISTILLING
    for top_k in ((8, 96) if case.values[0] == "logits" else (8,))
]


def outputs_of(model, batch) -> Unscored:
    """A student's forward as the losses see it, with attention of layers 0 and 1; layer 1 looks as a twig does."""
    vlm = VisionLanguageModel(model)
    features = batch.encoded_by(vlm.encode)
    predicts = batch["labels"][:, 1:] != IGNORE_INDEX
    answers = torch.nn.functional.pad(predicts, (0, 1))
    made = vlm.forward(batch, features, layers=[0, 1], answers=answers, query_layer=1)
    vision = None if features is None else features.flat
    scores, asks = made.query_attention.mean(dim=1), Counts.of(batch).asks_about_images > 0
    labels = batch["labels"][:, 1:][predicts]
    # Choices of one token, of the first three; the rewards are any numbers that depend on the sample alone.
    first = torch.nn.functional.pad(scores, (0, 3))[:, :3]
    nothing = torch.zeros(len(first))
    actions = Actions(first.clamp(min=1e-9).log(), first.detach().square(), nothing, nothing)
    return Unscored(made.logits, labels, made.slots, vision, made.attention, scores, asks, actions)


@torch.no_grad()
def targets_of(model, batch, top_k=8) -> TeacherTargets:
    """The same model's outputs as the store would give them back."""
    outputs = outputs_of(model, batch)
    log_probs = outputs.answer_logits.log_softmax(dim=-1)
    top, ids = log_probs.topk(top_k, dim=-1)
    tail = log_probs.scatter(1, ids, -math.inf).logsumexp(dim=-1).clamp(min=-30)
    of_twigs = {
        "query_attention": outputs.vision_scores[:, None],
        "final_hidden": outputs.answer_logits,
    }
    if top_k == log_probs.shape[1]:
        return TeacherTargets(outputs.attention, outputs.vision, ids, top, tail, **of_twigs)
    # Each position a sample of its own, named by what it says: a batch then draws what its samples do.
    keys = [str(row.topk(20).indices.tolist()) for row in log_probs]
    draws = draw_tail(log_probs, ids, keys=keys, num_answers=[1] * len(keys), num_draws=3)
    return TeacherTargets(
        outputs.attention,
        outputs.vision,
        ids,
        top,
        tail,
        draws,
        log_probs.gather(1, draws).clamp(min=-30),
        **of_twigs,
    )


def head_of(name, settings):
    """A head that maps equal to equal: the identity, or a mixture that takes head n for head n."""
    if LOSSES[name].head == "vision_map":
        return VisionMap(32, 32)
    if LOSSES[name].head == "base_head":  # `final_hidden` are the logits themselves here
        return torch.nn.Identity()
    if LOSSES[name].head == "head_mixer" and settings.heads == "mix":
        mixer = HeadMixer(len(settings.layers), 4, 4)
        with torch.no_grad():
            mixer.scores.copy_(1000 * torch.eye(4))
        return mixer
    return None


def compute(name, settings, student, teacher):
    return LOSSES[name].compute(student.scored(teacher), teacher, head_of(name, settings), settings)


def gradients(model, total):
    """Gradient of every parameter, zero where none arrives."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def norm(gradient):
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


@pytest.fixture(scope="module")
def student(tiny_model):
    return tiny_model(seed=0)


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return tiny_model(seed=1)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def batch(request, make_batch):
    return make_batch(*request.param)


def test_every_row_reads_targets_that_exist():
    for name, row in LOSSES.items():
        assert set(row.targets) <= set(TARGETS), name


def test_weights_are_the_published_1_but_for_the_term_that_hurt_at_it():
    weights = {name: row.settings().weight for name, row in LOSSES.items()}
    assert weights == dict.fromkeys(LOSSES, 1.0) | {"logits": 0.1, "prediction": 0.1}


@pytest.mark.parametrize(("name", "settings", "top_k"), ZERO)
def test_value_and_gradient_are_zero_at_the_teacher(name, settings, top_k, batch, student, teacher):
    outputs = outputs_of(student, batch)
    at_teacher, _ = compute(name, settings, outputs, targets_of(student, batch, top_k))
    elsewhere, _ = compute(name, settings, outputs, targets_of(teacher, batch, top_k))
    assert elsewhere > 0 and abs(at_teacher) <= 1e-5 * elsewhere
    far, near = gradients(student, elsewhere), gradients(student, at_teacher)
    assert norm(near) <= 1e-4 * norm(far) and norm(far) > 0


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_batch_is_the_sum_of_its_samples(name, settings, batch, student, teacher):
    total, count = compute(name, settings, outputs_of(student, batch), targets_of(teacher, batch))
    parts = [
        compute(name, settings, outputs_of(student, alone), targets_of(teacher, alone))
        for alone in batch.one_by_one()
    ]
    assert total.dtype == count.dtype == torch.float32 and total.ndim == count.ndim == 0
    assert float(count) == sum(float(part_count) for _, part_count in parts) > 0
    summed = torch.stack([part_total for part_total, _ in parts]).sum()
    torch.testing.assert_close(total, summed, atol=1e-6, rtol=1e-4)
    together, added = gradients(student, total), gradients(student, summed)
    difference = {parameter: together[parameter] - added[parameter] for parameter in together}
    assert norm(difference) <= 1e-3 * norm(together)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_count_is_known_before_the_forward(name, settings, batch, student, teacher):
    _, count = compute(name, settings, outputs_of(student, batch), targets_of(teacher, batch))
    assert LOSSES[name].count(settings, Counts.of(batch)) == float(count)


def padded(attention, rows=2, columns=3):
    """Garbage rows and columns after the real ones."""
    size = (*attention.shape[:2], attention.shape[2] + rows, attention.shape[3] + columns)
    garbage = torch.rand(size, generator=torch.Generator().manual_seed(5))
    garbage[:, :, : attention.shape[2], : attention.shape[3]] = attention
    return garbage


@pytest.mark.parametrize(("name", "settings"), DISTILLING)
def test_padding_is_never_seen(name, settings, batch, student, teacher):
    outputs, targets = outputs_of(student, batch), targets_of(teacher, batch)
    bare = {layer: a.detach().requires_grad_() for layer, a in outputs.attention.items()}
    slots = replace(
        outputs.slots,
        text=torch.nn.functional.pad(outputs.slots.text, (0, 2), value=-1),
        vision=torch.nn.functional.pad(outputs.slots.vision, (0, 3), value=-1),
    )
    garbage = {layer: padded(a.detach()).requires_grad_() for layer, a in bare.items()}
    dirty_targets = replace(targets, attention={n: padded(a) for n, a in targets.attention.items()})
    total, count = compute(name, settings, replace(outputs, attention=bare), targets)
    wide = replace(outputs, vision_scores=torch.nn.functional.pad(outputs.vision_scores, (0, 3)))
    query = torch.nn.functional.pad(targets.query_attention, (0, 3))
    dirty_targets = replace(dirty_targets, query_attention=query)
    dirty, dirty_count = compute(name, settings, replace(wide, attention=garbage, slots=slots), dirty_targets)
    torch.testing.assert_close(dirty, total)
    assert dirty_count == count
    if name == "attention":
        (dirty + total).backward()
        for layer in settings.teacher_layers():
            rows, columns = bare[layer].shape[2:]
            torch.testing.assert_close(garbage[layer].grad[:, :, :rows, :columns], bare[layer].grad)
            assert not garbage[layer].grad[:, :, rows:].any()
            assert not garbage[layer].grad[:, :, :, columns:].any()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_where_nothing_is_selected_the_loss_is_a_zero_that_can_be_differentiated(
    name, settings, student, teacher, make_batch
):
    batch = make_batch([4], [7], answers=0)
    total, count = compute(name, settings, outputs_of(student, batch), targets_of(teacher, batch))
    assert total.item() == count.item() == 0
    assert norm(gradients(student, total)) == 0


@pytest.mark.parametrize("name", ["attention", "vision_focus"])
def test_an_image_that_no_text_follows_is_not_selected(name, student, teacher, make_batch):
    settings = LOSSES[name].settings()
    batch = make_batch([4, IMAGE], [6])
    total, count = compute(name, settings, outputs_of(student, batch), targets_of(teacher, batch))
    assert total.item() == count.item() == 0 and norm(gradients(student, total)) == 0
    batch = make_batch([3, IMAGE, 2, IMAGE])
    outputs = outputs_of(student, batch)
    vision = outputs.vision.detach().requires_grad_()
    total, _ = compute(name, settings, replace(outputs, vision=vision), targets_of(teacher, batch))
    if name == "vision_focus":
        total.backward()
        assert vision.grad[:4].any() and not vision.grad[4:].any()


TEN = {
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.mm_projector.mlp.mlp.0.weight",
    "model.mm_projector.mlp.mlp.0.bias",
    "model.mm_projector.mlp.mlp.2.weight",
    "model.mm_projector.mlp.mlp.2.bias",
    "model.mm_projector.peg.peg.0.weight",
    "model.mm_projector.peg.peg.0.bias",
}


@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@pytest.mark.parametrize("settings", [s for s in SETTINGS["attention"] if s.layers == [(0, 0)]], ids=str)
def test_the_attention_loss_reaches_projector_embeddings_and_layer_0_q_and_k_and_nothing_else(
    settings, num_key_value_heads, teacher, tiny_model, make_batch
):
    student = tiny_model(seed=0, num_key_value_heads=num_key_value_heads)
    batch = make_batch(*LAYOUTS["with text alone"])
    total, _ = compute("attention", settings, outputs_of(student, batch), targets_of(teacher, batch))
    total.backward()
    reached = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert set(reached) == TEN
    assert all(gradient.abs().max() > 1e-7 for gradient in reached.values())


@torch.no_grad()
def test_the_transposed_block_holds_nothing_to_learn_from(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch([1, IMAGE, 9])
    model.set_attn_implementation("eager")
    attention = model(**batch.inputs(), output_attentions=True).attentions[0]
    vision, text = slice(1, 5), slice(5, 14)
    assert not attention[:, :, vision, text].any() and attention[:, :, text, vision].all()


@torch.no_grad()
def test_the_tokens_in_focus_are_those_that_text_attends_and_not_all_rows(tiny_model, make_batch):
    model = tiny_model(mm_projector_grid=4)
    batch = make_batch([9, IMAGE, 4, IMAGE, 5], [7], [2, IMAGE, 8], num_vision_tokens=16)
    chosen = focus_tokens(outputs_of(model, batch).attention[0], outputs_of(model, batch).slots, 5)
    model.set_attn_implementation("eager")
    whole = model(**batch.inputs(), output_attentions=True).attentions[0].mean(dim=1)
    by_text, by_all = [], []
    for sample, first, text in (
        (0, 9, [*range(25, 29), *range(45, 50)]),
        (0, 29, range(45, 50)),
        (2, 2, range(18, 26)),
    ):
        columns = whole[sample][:, first : first + 16]
        by_text.append(set(columns[list(text)].sum(dim=0).topk(5).indices.tolist()))
        by_all.append(set(columns[: text[-1] + 1].sum(dim=0).topk(5).indices.tolist()))
    assert [set(tokens.tolist()) for tokens in chosen] == by_text
    assert by_all != by_text
