"""The tap equals eager attention's rows and columns, with its gradient, whatever the batch holds."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.tap import TAPPED, QueryAndKey, recording, text_to_vision_attention
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import Slots, find_slots

LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3])
LAYERS = [0, 1, 2]


def tap(model, batch, layers=LAYERS):
    """Layer -> float32 'B H T J', from one forward without eager attention."""
    return forward(model, batch, layers).attention


def forward(model, batch, layers=LAYERS):
    vlm = VisionLanguageModel(model)
    return vlm.forward(batch, batch.encoded_by(vlm.encode), layers=layers)


def slots_of(batch):
    return find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"])


def eager_blocks(model, batch, layer):
    """Per sample 'H T J', cut from the whole matrix that eager attention returns."""
    model.set_attn_implementation("eager")
    whole = model(**batch.inputs(), output_attentions=True).attentions[layer]
    slots = slots_of(batch)
    for row, (text, vision) in enumerate(zip(slots.text, slots.vision, strict=True)):
        yield whole[row][:, text[text >= 0]][:, :, vision[vision >= 0]]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
@torch.no_grad()
def test_equal_to_the_rows_and_columns_of_eager_attention(layer, num_key_value_heads, tiny_model, make_batch):
    model, eager = (tiny_model(num_key_value_heads=num_key_value_heads) for _ in range(2))
    batch = make_batch(*LAYOUTS)
    slots, tapped = slots_of(batch), tap(model, batch)[layer]
    assert tapped.dtype == torch.float32
    assert tapped.shape == (4, 4, slots.text.shape[1], slots.vision.shape[1])
    for row, block in enumerate(eager_blocks(eager, batch, layer)):
        num_rows, num_columns = block.shape[1:]
        torch.testing.assert_close(tapped[row, :, :num_rows, :num_columns], block, atol=1e-6, rtol=1e-5)
        assert not tapped[row, :, num_rows:].any() and not tapped[row, :, :, num_columns:].any()
    assert tapped.max() > 0.3  # the random models attend to something


@torch.no_grad()
def test_text_before_an_image_does_not_attend_it(tiny_model, make_batch):
    attention = tap(tiny_model(), make_batch([IMAGE, 2, IMAGE, 3]))[0][0]
    first_rows, second_image = attention[:, :2, 4:], attention[:, 2:, 4:]
    assert not first_rows.any() and second_image.all()


@pytest.mark.parametrize("layouts", [([4], [7]), ([4, IMAGE],)], ids=["text only", "nothing after the image"])
@torch.no_grad()
def test_without_rows_or_columns_the_result_is_empty(layouts, tiny_model, make_batch):
    made = forward(tiny_model(), make_batch(*layouts), [0])
    assert made.attention[0].shape == (len(layouts), 4, 0, made.slots.vision.shape[1])


@torch.no_grad()
def test_padding_on_the_left_is_never_attended(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch([3, IMAGE, 5])
    alone = tap(model, batch, [0, 1])
    for name in ("input_ids", "attention_mask", "labels", "is_vision"):
        batch[name] = torch.nn.functional.pad(batch[name], (3, 0), value=7 if name == "input_ids" else 0)
    padded = tap(model, batch, [0, 1])  # positions begin at 3; rotary embeddings see differences alone
    for layer in (0, 1):
        torch.testing.assert_close(padded[layer], alone[layer], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_half_precision_gives_probabilities_in_float32(tiny_model, make_batch):
    attention = tap(tiny_model().to(torch.bfloat16), make_batch(*LAYOUTS))[1]
    assert attention.dtype == torch.float32 and (attention.sum(dim=-1) < 1.001).all()


def gradients(model, attention):
    model.zero_grad()
    sum(block.square().sum() for block in attention).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_is_that_of_eager_attention(tiny_model, make_batch):
    model, eager = tiny_model(num_key_value_heads=2), tiny_model(num_key_value_heads=2)
    batch = make_batch(*LAYOUTS)
    mine = gradients(model, [tap(model, batch, [1])[1]])
    theirs = gradients(eager, list(eager_blocks(eager, batch, 1)))
    for name, gradient in theirs.items():
        found = mine.pop(name, torch.zeros_like(gradient))
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert not mine


def test_gradient_checkpointing_changes_no_gradient(tiny_model, make_batch):
    model, batch = tiny_model().train(), make_batch(*LAYOUTS)

    def all_gradients():
        vlm = VisionLanguageModel(model)
        answers = batch["labels"] >= 0
        made = vlm.forward(batch, batch.encoded_by(vlm.encode), layers=[0, 1], answers=answers)
        return gradients(model, [*made.attention.values(), made.logits])

    plain = all_gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.model.layers[0].gradient_checkpointing
    checkpointed = all_gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_no_recording_is_open_after_the_context_even_after_an_error(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch([3, IMAGE, 5])
    VisionLanguageModel(model)
    with pytest.raises(KeyError), recording([0, 2]) as made:
        raise KeyError
    model(**batch.inputs())
    assert made.num_seen == 0 and not made.kept


def test_a_forward_that_is_stopped_runs_no_layer_behind(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS)
    whole = tap(model, batch, [0, 1])
    for layer in model.model.layers[2:]:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("a layer behind the last one recorded ran"))
    vlm = VisionLanguageModel(model)
    made = vlm.forward(batch, batch.encoded_by(vlm.encode), layers=[0, 1], stop_at=1)
    assert made.logits is None
    assert all(torch.equal(made.attention[layer], whole[layer]) for layer in (0, 1))


@pytest.mark.parametrize("is_additive", [False, True])
def test_the_models_own_mask_decides_what_a_row_sees(is_additive):
    """Text at 3 sees itself and one of the two vision tokens, equally: no key is nearer than another."""
    sees = torch.tensor([True, False, False, True]).expand(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~sees, -1e9) if is_additive else sees
    kept = QueryAndKey(torch.zeros(1, 2, 4, 8), torch.ones(1, 1, 4, 8), mask, 1.0, is_causal=True)
    slots = Slots(text=torch.tensor([[3]]), vision=torch.tensor([[0, 1]]))
    assert text_to_vision_attention(kept, slots).tolist() == [[[[0.5, 0.0]], [[0.5, 0.0]]]]


def test_a_soft_cap_is_refused():
    """SDPA would ignore it."""
    query = torch.zeros(1, 1, 2, 4)
    with recording([0]), pytest.raises(ConfigError, match="attention with a soft cap cannot be computed"):
        AttentionInterface()[TAPPED](None, query, query, query, None, softcap=30.0)
