"""What is kept of a teacher comes back as it was: capture, then collate, for every row of TARGETS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cache import CODECS
from cache.format.codecs import decode_rows, encode_rows
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE_TOKEN_INDEX
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.target import Target, TeacherFacts
from pipeline.targets.targets import TARGETS, deepest_layer
from pipeline.targets.vision import VisionTarget

IMAGE = IMAGE_TOKEN_INDEX
LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3], [4, IMAGE])
ASKED = {
    "attention": AttentionTarget(layers=[0, 2], heads="each"),
    "vision": VisionTarget(),
    "logits": LogitsTarget(top_k=8),
}
ALSO = {
    "logits": [LogitsTarget(top_k=8, tail_samples=3)],
    "attention": [AttentionTarget(codec="fixed_point")],
}
VALUES = [
    pytest.param(name, settings, id=f"{name}-{settings}")
    for name, row in TARGETS.items()
    for settings in {str(s): s for s in (row(), *ALSO.get(name, ()), ASKED.get(name, row()))}.values()
]
FACTS = TeacherFacts("some/teacher", 4, 4, 32, 4, 96)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    plan = plan_teacher(str(teacher_folder), targets=ASKED)
    return load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))


def run(teacher, batch):
    vision = None if batch.pixel_values is None else teacher.encode_images(batch.pixel_values)
    keys = [
        str(ids[mask].tolist())
        for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)
    ]
    forward = teacher.forward(batch.input_ids, batch.attention_mask, batch.labels, vision)
    return vision, replace(forward, keys=keys, vision=vision)


def captured(target: Target, teacher, batch) -> list[dict[str, np.ndarray]]:
    """Per sample what the store would return for it, `num_images` included."""
    _, forward = run(teacher, batch)
    num_images = (batch.input_ids == IMAGE).sum(dim=1).tolist()
    samples = target.capture(forward)
    if target.owner == "image":
        images, [spec] = iter(samples), target.arrays(FACTS)
        nothing = np.zeros((0, *spec.row_shape), dtype=np.float32)
        samples = [
            {spec.name: np.concatenate([nothing, *(next(images)[spec.name] for _ in range(n))])}
            for n in num_images
        ]
    return [s | {"num_images": np.array(n)} for s, n in zip(samples, num_images, strict=True)]


@pytest.fixture
def batch(make_batch):
    return make_batch(*LAYOUTS)


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_captured_arrays_are_as_specified(name, settings, teacher, batch):
    samples, specs = captured(settings, teacher, batch), settings.arrays(FACTS)
    assert settings.first_array in {spec.name for spec in specs}
    for spec in specs:
        assert spec.codec in CODECS and spec.row_shape == samples[0][spec.name].shape[1:]
        assert all(sample[spec.name].shape[1:] == spec.row_shape for sample in samples)
        assert all(np.isfinite(sample[spec.name]).all() for sample in samples)


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_the_number_of_rows_is_known_from_ids_and_labels(name, settings, teacher, batch):
    expected = TARGETS[name].num_rows(Counts.of(vars(batch)))
    samples = captured(settings, teacher, batch)
    assert [len(sample[settings.first_array]) for sample in samples] == expected.tolist()
    for sample, num_rows in zip(samples, expected.tolist(), strict=True):
        blank = settings.blank(FACTS, num_rows)
        assert {array: zeros.shape for array, zeros in blank.items()} == {
            array: sample[array].shape for array in blank
        }


@pytest.mark.parametrize(("name", "settings"), VALUES)
def test_a_sample_is_captured_the_same_alone_and_in_a_padded_batch(
    name, settings, teacher, batch, split_batch
):
    together = captured(settings, teacher, batch)
    for sample, alone in zip(together, split_batch(batch), strict=True):
        [single] = captured(settings, teacher, alone)
        for array, values in single.items():
            np.testing.assert_allclose(sample[array], values, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("layouts", [LAYOUTS, ([4], [7])], ids=["images", "text alone"])
def test_attention_comes_back_as_the_tap_gave_it(heads, layouts, teacher, make_batch):
    batch, settings = make_batch(*layouts), AttentionTarget(layers=[0, 2], heads=heads)
    _, forward = run(teacher, batch)
    back = settings.collate(captured(settings, teacher, batch))
    assert list(back["attention"]) == [0, 2]
    for layer, attention in back["attention"].items():
        tapped = forward.attention[layer]
        tapped = tapped if heads == "each" else tapped.mean(dim=1, keepdim=True)
        assert torch.equal(attention, tapped)


def test_attention_rows_are_stored_image_after_image(teacher, make_batch):
    batch, settings = make_batch([1, IMAGE, 2, IMAGE, 3]), AttentionTarget(heads="each")
    _, forward = run(teacher, batch)
    [sample] = captured(settings, teacher, batch)
    stored = sample["attention/layer_0"]
    assert stored.shape == (2 * 5, 4, 4)
    for image, text in ((0, 0), (0, 4), (1, 3)):
        block = forward.attention[0][0, :, text, 4 * image : 4 * image + 4]
        assert np.array_equal(stored[5 * image + text], block.numpy())
    assert not stored[5:7].any() and stored[7:].all()


def test_vision_features_come_back_in_the_order_of_images(teacher, batch):
    vision, _ = run(teacher, batch)
    back = VisionTarget().collate(captured(VisionTarget(), teacher, batch))
    assert torch.equal(back["vision"], vision) and back["vision"].is_contiguous()


def test_vision_features_of_text_alone_are_none_at_all(teacher, make_batch):
    samples = captured(VisionTarget(), teacher, make_batch([4], [7]))
    assert VisionTarget().collate(samples)["vision"].shape == (0, 4, 32)


@pytest.mark.parametrize("top_k", [1, 8, 96, 500])
def test_logits_come_back_as_the_top_k_and_the_mass_of_the_rest(top_k, teacher, batch):
    settings = LogitsTarget(top_k=top_k)
    _, forward = run(teacher, batch)
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
    _, forward = run(teacher, batch)
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
    facts = TeacherFacts("some/teacher", 4, 4, 32, 4, vocab_size)
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
    for sample in captured(settings, teacher, batch):
        rows = sample[spec.name]
        error = np.abs(decode_rows(spec, encode_rows(spec, rows)).astype(np.float64) - rows)
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
