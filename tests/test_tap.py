"""The tap equals eager attention's rows and columns, with its gradient, whatever the batch holds."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE_TOKEN_INDEX
from pipeline.models.tap import record_layer_inputs, text_to_vision_attention

IMAGE = IMAGE_TOKEN_INDEX
LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3])
LAYERS = [0, 1, 2]


def merged_inputs(model, batch):
    features = None if batch.pixel_values is None else model.encode_images(batch.pixel_values)
    return model.merge_inputs(
        batch.input_ids, features, attention_mask=batch.attention_mask, labels=batch.labels
    )


def run(model, merged, **options):
    return model.model(
        inputs_embeds=merged.inputs_embeds,
        attention_mask=merged.attention_mask.long(),
        use_cache=False,
        **options,
    )


def tap(model, merged, layers=LAYERS):
    """Layer -> float32 'B H T J', from one forward without eager attention."""
    with record_layer_inputs(model.model.layers, layers) as inputs:
        run(model, merged)
    positions = torch.arange(merged.inputs_embeds.shape[1])[None]
    return {
        layer: text_to_vision_attention(
            model.model.layers[layer],
            inputs[layer],
            position_embeddings=model.model.rotary_emb(merged.inputs_embeds, positions),
            attention_mask=merged.attention_mask,
            slots=merged.slots,
        )
        for layer in layers
    }


def eager_blocks(model, merged, layer):
    """Per sample 'H T J', cut from the whole matrix that eager attention returns."""
    whole = run(model, merged, output_attentions=True).attentions[layer]
    for row, (text, vision) in enumerate(zip(merged.slots.text, merged.slots.vision, strict=True)):
        yield whole[row][:, text[text >= 0]][:, :, vision[vision >= 0]]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
@torch.no_grad()
def test_equal_to_the_rows_and_columns_of_eager_attention(layer, num_key_value_heads, tiny_model, make_batch):
    model = tiny_model(num_key_value_heads=num_key_value_heads)
    eager = tiny_model(num_key_value_heads=num_key_value_heads)
    eager.set_attn_implementation("eager")
    merged = merged_inputs(model, make_batch(*LAYOUTS))
    tapped = tap(model, merged)[layer]
    assert tapped.dtype == torch.float32
    assert tapped.shape == (4, 4, merged.slots.text.shape[1], merged.slots.vision.shape[1])
    for row, block in enumerate(eager_blocks(eager, merged, layer)):
        num_rows, num_columns = block.shape[1:]
        torch.testing.assert_close(tapped[row, :, :num_rows, :num_columns], block, atol=1e-6, rtol=1e-5)
        assert not tapped[row, :, num_rows:].any() and not tapped[row, :, :, num_columns:].any()
    assert tapped.max() > 0.3  # the random models attend to something


@torch.no_grad()
def test_text_before_an_image_does_not_attend_it(tiny_model, make_batch):
    model = tiny_model()
    merged = merged_inputs(model, make_batch([IMAGE, 2, IMAGE, 3]))
    attention = tap(model, merged)[0][0]
    first_rows, second_image = attention[:, :2, 4:], attention[:, 2:, 4:]
    assert not first_rows.any() and second_image.all()


@pytest.mark.parametrize("layouts", [([4], [7]), ([4, IMAGE],)], ids=["text only", "nothing after the image"])
@torch.no_grad()
def test_without_rows_or_columns_the_result_is_empty(layouts, tiny_model, make_batch):
    model = tiny_model()
    merged = merged_inputs(model, make_batch(*layouts))
    attention = tap(model, merged, [0])[0]
    assert attention.shape == (len(layouts), 4, 0, merged.slots.vision.shape[1])


@torch.no_grad()
def test_padding_on_the_left_is_never_attended(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch([3, IMAGE, 5])
    merged = merged_inputs(model, batch)
    alone = tap(model, merged, [0])[0]
    positions = torch.arange(-3, merged.inputs_embeds.shape[1])[None]
    slots = type(merged.slots)(merged.slots.text + 3, merged.slots.vision + 3)
    padded = text_to_vision_attention(
        model.model.layers[0],
        torch.nn.functional.pad(merged.inputs_embeds, (0, 0, 3, 0), value=9.0),
        position_embeddings=model.model.rotary_emb(merged.inputs_embeds, positions),
        attention_mask=torch.nn.functional.pad(merged.attention_mask, (3, 0)),
        slots=slots,
    )
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_half_precision_gives_probabilities_in_float32(tiny_model, make_batch):
    model = tiny_model().to(torch.bfloat16)
    attention = tap(model, merged_inputs(model, make_batch(*LAYOUTS)))[1]
    assert attention.dtype == torch.float32 and (attention.sum(dim=-1) < 1.001).all()


def gradients(model, attention):
    model.zero_grad()
    sum(block.square().sum() for block in attention).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_is_that_of_eager_attention(tiny_model, make_batch):
    model, eager = tiny_model(num_key_value_heads=2), tiny_model(num_key_value_heads=2)
    eager.set_attn_implementation("eager")
    batch = make_batch(*LAYOUTS)
    mine = gradients(model, [tap(model, merged_inputs(model, batch), [1])[1]])
    theirs = gradients(eager, list(eager_blocks(eager, merged_inputs(eager, batch), 1)))
    for name, gradient in theirs.items():
        found = mine.pop(name, torch.zeros_like(gradient))
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert not mine


def test_gradient_checkpointing_changes_no_gradient(tiny_model, make_batch):
    model, batch = tiny_model().train(), make_batch(*LAYOUTS)

    def all_gradients():
        merged = merged_inputs(model, batch)
        with record_layer_inputs(model.model.layers, [0, 1]) as inputs:
            last = run(model, merged).last_hidden_state
        cos_sin = model.model.rotary_emb(last, torch.arange(last.shape[1])[None])
        common = {"position_embeddings": cos_sin, "attention_mask": merged.attention_mask}
        attention = [
            text_to_vision_attention(model.model.layers[n], inputs[n], slots=merged.slots, **common)
            for n in (0, 1)
        ]
        return gradients(model, [*attention, last])

    plain = all_gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.model.layers[0].gradient_checkpointing
    checkpointed = all_gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_hooks_are_gone_after_the_context_even_after_an_error(tiny_model):
    layers = tiny_model().model.layers
    with pytest.raises(KeyError), record_layer_inputs(layers, [0, 2]):
        raise KeyError
    assert not any(layer._forward_pre_hooks for layer in layers)
