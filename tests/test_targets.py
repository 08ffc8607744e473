"""What is kept of a teacher comes back as it was: capture, then collate, for every row of TARGETS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cache import CODECS, ArraySpec
from cache.format.codecs import decode_rows, encode_rows
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.positions import Counts, find_slots
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.final_hidden import FinalHiddenTarget
from pipeline.targets.hidden_states import HiddenStatesTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.query_attention import QueryAttentionTarget
from pipeline.targets.target import Arrays, Target, TeacherFacts, TeacherForward
from pipeline.targets.targets import TARGETS, deepest_layer
from pipeline.targets.vision import VisionTarget

LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3], [4, IMAGE])
ASKED = {
    "attention": AttentionTarget(layers=[0, 2], heads="each"),
    "vision": VisionTarget(),
    "logits": LogitsTarget(top_k=8),
    "hidden_states": HiddenStatesTarget(),
    "final_hidden": FinalHiddenTarget(),
    "query_attention": QueryAttentionTarget(layer=1, heads="each"),
}
ALSO = {
    "logits": [LogitsTarget(top_k=8, tail_samples=3)],
    "attention": [AttentionTarget(codec="fixed_point")],
    "query_attention": [QueryAttentionTarget(layer=1)],
}
# The fixture's teacher keeps the query of one layer.
DEFAULTS = {name: [row()] for name, row in TARGETS.items() if name != "query_attention"}
VALUES = [
    pytest.param(name, settings, id=f"{name}-{settings}")
    for name, row in TARGETS.items()
    for settings in {str(s): s for s in (*DEFAULTS.get(name, ()), *ALSO.get(name, ()), ASKED[name])}.values()
]
FACTS = TeacherFacts("some/teacher", num_layers=4, num_heads=4, hidden_size=32, vocab_size=96)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    plan = plan_teacher(str(teacher_folder), targets=ASKED)
    return load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))


def run(teacher, batch):
    features = batch.encoded_by(teacher.encode_images)
    keys = [str(tokens.input_ids) for tokens, _ in batch.samples]
    vision = () if features is None else features.tokens
    return replace(teacher.forward(batch, features), keys=keys, vision=vision)


def captured(target: Target, teacher, batch) -> list[Arrays]:
    """Return what the store would give back of each sample."""
    samples = target.capture(run(teacher, batch))
    if target.owner == "image":
        images = iter(samples)
        samples = [{"vision": [next(images)["vision"][0] for _ in sizes]} for sizes in batch["sizes"]]
    return samples


def rows_of(spec: ArraySpec, sample: Arrays, sizes) -> list[tuple[ArraySpec, np.ndarray]]:
    """Return the rows of an array, and the spec that says their shape; of a ragged array, those of each image."""
    if not spec.is_ragged:
        return [(spec, sample[spec.name])]
    blocks = [block[None] if spec.owner == "image" else block for block in sample[spec.name]]
    return [(spec.with_tokens(size), block) for size, block in zip(sizes, blocks, strict=True)]


@pytest.fixture
def batch(make_batch):
    return make_batch(*LAYOUTS)


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_captured_arrays_are_as_specified(name, settings, teacher, batch):
    samples, specs = captured(settings, teacher, batch), settings.arrays(FACTS)
    assert settings.first_array in {spec.name for spec in specs}
    assert settings.of_images() == [spec.name for spec in specs if spec.is_ragged]
    for spec in specs:
        assert spec.codec in CODECS
        for sample, sizes in zip(samples, batch["sizes"], strict=True):
            for expected, rows in rows_of(spec, sample, sizes):
                assert rows.shape[1:] == expected.row_shape and np.isfinite(rows).all()


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_the_number_of_rows_is_known_from_ids_and_labels(name, settings, teacher, batch):
    counts, samples = Counts.of(batch), captured(settings, teacher, batch)
    found = [settings.rows_in(sample) for sample in samples]
    assert found == TARGETS[name].num_rows(counts).tolist() and any(found)


@pytest.mark.parametrize(("name", "settings"), [case for case in VALUES if case.values[0] != "logits"])
def test_zeros_to_be_recomputed_have_the_shape_of_what_is_captured(name, settings, teacher, batch):
    alone = [Counts.of(one) for one in batch.one_by_one()]
    for sample, sizes, counts in zip(captured(settings, teacher, batch), batch["sizes"], alone, strict=True):
        blank = settings.blank(FACTS, sizes, counts)
        assert {array: [block.shape for block in blocks] for array, blocks in blank.items()} == {
            array: [block.shape for block in blocks] for array, blocks in sample.items()
        }
        assert not any(block.any() for blocks in blank.values() for block in blocks)


def test_logits_are_never_to_be_recomputed(make_batch):
    with pytest.raises(ConfigError, match="logits cannot be recomputed by a stub; complete the store"):
        LogitsTarget().blank(FACTS, (4,), Counts.of(make_batch([1, IMAGE, 3])))


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_a_sample_is_captured_the_same_alone_and_in_a_padded_batch(name, settings, teacher, batch):
    together = captured(settings, teacher, batch)
    for sample, alone in zip(together, batch.one_by_one(), strict=True):
        [single] = captured(settings, teacher, alone)
        assert single.keys() == sample.keys()
        for array, values in single.items():
            for mine, other in zip(sample[array], values, strict=True):
                np.testing.assert_allclose(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", ["each", "mean"])
def test_attention_comes_back_as_the_tap_gave_it(heads, teacher, batch):
    settings = AttentionTarget(layers=[0, 2], heads=heads)
    forward = run(teacher, batch)
    back = settings.collate(captured(settings, teacher, batch))
    assert list(back["attention"]) == [0, 2]
    for layer, attention in back["attention"].items():
        tapped = forward.attention[layer]
        tapped = tapped if heads == "each" else tapped.mean(dim=1, keepdim=True)
        assert torch.equal(attention, tapped)


def test_attention_of_text_alone_has_no_rows_and_no_columns(teacher, make_batch):
    settings = AttentionTarget(heads="each")
    back = settings.collate(captured(settings, teacher, make_batch([4], [7])))
    assert back["attention"][0].shape == (2, 1, 0, 0)


def test_attention_is_stored_image_after_image(teacher, make_batch):
    batch, settings = make_batch([1, IMAGE, 2, IMAGE, 3]), AttentionTarget(heads="each")
    forward = run(teacher, batch)
    [sample] = captured(settings, teacher, batch)
    first, second = sample["attention/layer_0"]
    assert first.shape == second.shape == (5, 4, 4)
    for text in range(5):
        row = forward.attention[0][0, :, text].numpy()
        assert np.array_equal(first[text], row[:, :4]) and np.array_equal(second[text], row[:, 4:])
    assert not second[:2].any() and second[2:].all()


def test_images_of_several_sizes_come_back_each_in_its_columns():
    """One sample with images of 1 and 2 vision tokens, and a shorter one with an image of 2."""
    is_vision = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
    mask, sizes = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]), [(1, 2), (2,)]
    slots = find_slots(is_vision, mask, sizes)
    real = (slots.text >= 0)[:, None, :, None] & (slots.vision >= 0)[:, None, None, :]
    attention = torch.rand(2, 3, 2, 3) * real
    vision = [torch.randn(size, 5) for size in (1, 2, 2)]
    forward = TeacherForward(slots, {0: attention}, None, [0, 0], sizes, vision)
    settings = AttentionTarget(heads="each")
    samples = settings.capture(forward)
    assert [[block.shape for block in sample["attention/layer_0"]] for sample in samples] == [
        [(2, 3, 1), (2, 3, 2)],
        [(1, 3, 2)],
    ]
    assert torch.equal(settings.collate(samples)["attention"][0], attention)
    one, two, three = (image["vision"] for image in VisionTarget().capture(forward))
    back = VisionTarget().collate([{"vision": [one, two]}, {"vision": [three]}])
    assert torch.equal(back["vision"], torch.cat(vision))


def test_vision_features_come_back_in_the_order_of_images(teacher, batch):
    back = VisionTarget().collate(captured(VisionTarget(), teacher, batch))
    assert torch.equal(back["vision"], batch.encoded_by(teacher.encode_images).flat)


def test_vision_features_of_text_alone_are_none_at_all(teacher, make_batch):
    samples = captured(VisionTarget(), teacher, make_batch([4], [7]))
    assert not len(VisionTarget().collate(samples)["vision"])


@pytest.mark.parametrize("top_k", [1, 8, 96, 500])
def test_logits_come_back_as_the_top_k_and_the_mass_of_the_rest(top_k, teacher, batch):
    settings = LogitsTarget(top_k=top_k)
    forward = run(teacher, batch)
    back = settings.collate(captured(settings, teacher, batch))
    log_probs = forward.answer_logits.double().log_softmax(dim=-1)
    kept = min(top_k, 96)
    assert back["top_ids"].dtype == torch.int64 and back["top_ids"].shape == (9, kept)
    ordered = log_probs.sort(dim=-1, descending=True)
    assert torch.equal(back["top_ids"][:, 0], ordered.indices[:, 0])
    wanted = ordered.values[:, :kept].clamp(min=-30).float()
    torch.testing.assert_close(back["top_log_probs"], wanted, atol=1e-5, rtol=1e-5)
    rest = ordered.values[:, kept:].exp().sum(dim=-1).log().clamp(min=-30)
    torch.testing.assert_close(back["tail_log_prob"], rest.float(), atol=1e-4, rtol=1e-4)


def test_probabilities_too_small_to_matter_are_stored_finite(teacher, batch):
    forward = run(teacher, batch)
    certain = torch.full_like(forward.answer_logits, -1e4)
    certain[:, 7] = 1e4
    samples = LogitsTarget(top_k=2).capture(replace(forward, answer_logits=certain))
    back = LogitsTarget(top_k=2).collate(samples)
    assert back["top_log_probs"].tolist() == [[0.0, -30.0]] * 9
    assert back["tail_log_prob"].tolist() == [-30.0] * 9


@pytest.mark.parametrize(
    ("vocab_size", "top_k", "id_type"),
    [(96, 32, "uint16"), (2**16, 32, "uint16"), (2**16 + 1, 32, "int32"), (5, 5, "uint16")],
)
def test_token_ids_are_as_narrow_as_the_vocabulary_allows(vocab_size, top_k, id_type):
    facts = replace(FACTS, vocab_size=vocab_size)
    ids, log_probs, tail = LogitsTarget(top_k=32).arrays(facts)
    assert ids.options == {"dtype": id_type} and ids.row_shape == log_probs.row_shape == (top_k,)
    assert tail.row_shape == ()


def test_only_a_fixed_point_has_a_step():
    [fixed] = VisionTarget(step=0.5).arrays(FACTS)
    [half] = VisionTarget(codec="float16").arrays(FACTS)
    assert (fixed.options, half.options) == ({"step": 0.5}, {})


@pytest.mark.parametrize("row", [AttentionTarget, VisionTarget])
@pytest.mark.parametrize("step", [0.01, 0, -0.5, 3])
def test_a_step_by_which_decoding_would_round_is_refused(row, step):
    with pytest.raises(ValidationError, match="expected a power of two, such as"):
        row(codec="fixed_point", step=step)


@pytest.mark.parametrize(
    ("name", "codec"),
    [(name, codec) for name in ("attention", "vision") for codec in ("float32", "float16", "fixed_point")]
    + [("attention", "sqrt_uint8"), ("vision", "int8")],
)
def test_a_target_comes_back_within_what_its_codec_states(name, codec, teacher, batch):
    settings: Any = TARGETS[name](codec=codec)
    [spec] = settings.arrays(FACTS)
    assert spec.options == ({"step": settings.step} if codec == "fixed_point" else {})
    for sample, sizes in zip(captured(settings, teacher, batch), batch["sizes"], strict=True):
        for one, rows in rows_of(spec, sample, sizes):
            error = np.abs(decode_rows(one, encode_rows(one, rows)).astype(np.float64) - rows)
            assert (error <= CODECS[codec].max_error(rows, spec.options)).all()
    assert CODECS[codec].stated_error(spec.options)


def test_a_layer_that_the_teacher_lacks_is_refused():
    with pytest.raises(ConfigError, match="asks for layer 4, but the teacher has layers 0 to 3; ask for one"):
        AttentionTarget(layers=[0, 4]).arrays(FACTS)


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [-1, 0]])
def test_layers_out_of_order_are_refused(layers):
    with pytest.raises(ValidationError, match="layers must ascend from 0 on, without repeats; found"):
        AttentionTarget(layers=layers)


@pytest.mark.parametrize(
    ("targets", "deepest"),
    [
        ({}, -1),
        ({"vision": VisionTarget()}, -1),
        ({"attention": AttentionTarget(layers=[0, 3]), "vision": VisionTarget()}, 3),
        ({"attention": AttentionTarget(), "logits": LogitsTarget()}, None),
    ],
)
def test_the_deepest_layer_is_that_of_the_most_demanding_target(targets, deepest):
    assert deepest_layer(targets) == deepest
