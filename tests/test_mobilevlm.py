"""MobileVLM V2: equal to the original code, blind to batching and padding, and able to generate."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import CLIPVisionModel

from pipeline.models.merge import ImageCountError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE_TOKEN_INDEX
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.tap import text_to_vision_attention
from pipeline.positions import IGNORE_INDEX
from pipeline.shapes import ShapeError

IMAGE = IMAGE_TOKEN_INDEX
HEADS = [{"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}]
# Early, late and adjacent images, one image, no image; lengths differ, so the batch is padded.
LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3], [9, IMAGE, 2])


@pytest.fixture(scope="module")
def ours(original, expected):
    """What our model computes from the original's inputs, under the original's names."""
    labels, mask = expected["labels"], expected["attention_mask"]
    with torch.no_grad():
        features = original.encode_images(expected["pixel_values"])
        merged = original.merge_inputs(expected["input_ids"], features, attention_mask=mask, labels=labels)
        output = original(
            expected["input_ids"], mask, labels, expected["pixel_values"], output_hidden_states=True
        )
    return {
        "image_features": features,
        "inputs_embeds": merged.inputs_embeds,
        "merged_labels": merged.labels,
        "merged_attention_mask": merged.attention_mask.long(),
        "logits": output.logits,
        "loss": output.loss[None],
        "hidden_state_1": output.hidden_states[1],
    }


@pytest.mark.parametrize("name", ["image_features", "loss", "merged_labels", "merged_attention_mask"])
def test_equal_to_the_original_code(name, ours, expected):
    assert ours[name].shape == expected[name].shape
    torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["inputs_embeds", "logits", "hidden_state_1"])
def test_equal_to_the_original_code_where_nothing_is_padding(name, ours, expected):
    real = expected["merged_attention_mask"].bool()
    assert ours[name].shape == expected[name].shape and not real.all()
    torch.testing.assert_close(ours[name][real], expected[name][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_tapped_attention_is_the_originals(layer, original, expected):
    features = original.encode_images(expected["pixel_values"])
    merged = original.merge_inputs(expected["input_ids"], features, attention_mask=expected["attention_mask"])
    states = merged.inputs_embeds if layer == 0 else expected["hidden_state_1"]
    positions = torch.arange(states.shape[1])[None]
    tapped = text_to_vision_attention(
        original.model.layers[layer],
        states,
        position_embeddings=original.model.rotary_emb(states, positions),
        attention_mask=merged.attention_mask,
        slots=merged.slots,
    )
    whole = expected[f"attention_layer{layer}"]
    for row, (text, vision) in enumerate(zip(merged.slots.text, merged.slots.vision, strict=True)):
        text, vision = text[text >= 0], vision[vision >= 0]
        assert len(text) and len(vision) == 144
        block = whole[row][:, text][:, :, vision]
        torch.testing.assert_close(tapped[row, :, : len(text)], block, atol=1e-4, rtol=0)


def test_the_towers_geometry_may_be_given_on_loading(fixture_folder, ours, expected):
    geometry = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    model = MobileVLMForCausalLM.from_pretrained(fixture_folder, vision_config=geometry)
    with torch.no_grad():
        features = model.encode_images(expected["pixel_values"])
    assert torch.equal(features, ours["image_features"])


def test_the_tower_can_be_described_after_the_config_was_read(fixture_folder, expected):
    config = MobileVLMConfig.from_pretrained(fixture_folder)
    config.vision_config = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    model = MobileVLMForCausalLM.from_pretrained(fixture_folder, config=config)
    features = model.encode_images(expected["pixel_values"])
    assert (features - expected["image_features"]).abs().max() < 1e-4


def test_a_published_config_means_the_clip_that_it_names(fixture_folder):
    tower = MobileVLMConfig.from_pretrained(fixture_folder).vision_config
    sizes = (tower.hidden_size, tower.num_hidden_layers, tower.num_attention_heads, tower.intermediate_size)
    assert sizes == (1024, 24, 16, 4096) and (tower.image_size, tower.patch_size) == (336, 14)
    assert tower.hidden_act == "quick_gelu" and tower.layer_norm_eps == 1e-5


@pytest.mark.parametrize("composite", [False, True])
def test_a_local_clip_folder_gives_its_geometry(composite, fixture_folder, tmp_path):
    geometry = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    content = {"model_type": "clip", "vision_config": geometry} if composite else geometry
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = MobileVLMConfig(mm_vision_tower=str(tmp_path))
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (32, 336)


def test_fields_of_other_programs_in_a_config_change_nothing(described_checkpoint):
    plain = MobileVLMConfig.from_pretrained(described_checkpoint)
    leftovers = {"n_head": 16, "n_query_groups": 16, "n_embd": 2560, "n_layer": 32, "norm_eps": 1e-5}
    config = MobileVLMConfig.from_pretrained(described_checkpoint, **leftovers)
    kept = ("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers", "rms_norm_eps")
    assert [getattr(config, name) for name in kept] == [getattr(plain, name) for name in kept]


def test_a_tower_of_unknown_geometry_is_refused():
    with pytest.raises(ValueError, match=r"describes no vision tower: mm_vision_tower is 'some/tower'"):
        MobileVLMConfig(mm_vision_tower="some/tower")


def test_another_projector_is_refused():
    with pytest.raises(ValueError, match=r"only 'ldpnetv2' \(MobileVLM V2\) is supported, found 'ldpnet'"):
        MobileVLMConfig(mm_projector_type="ldpnet")


def test_another_feature_selection_is_refused(tiny_model):
    with pytest.raises(ValueError, match="expected 'patch' or 'cls_patch', found 'cls'"):
        tiny_model(mm_vision_select_feature="cls")


def test_patches_that_fill_no_square_are_refused(tiny_model):
    with pytest.raises(ValueError, match="a square grid of patches, found 17 patches"):
        tiny_model(mm_vision_select_feature="cls_patch").encode_images(torch.zeros(1, 3, 56, 56))


def test_images_of_another_size_are_refused(tiny_model):
    with pytest.raises(ShapeError, match="pixel_values: expected axes 'I 3 56 56', found shape"):
        tiny_model().encode_images(torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 1])
def test_image_features_are_those_of_clip_and_the_projector_by_hand(select_layer, tiny_model):
    model = tiny_model(mm_vision_select_layer=select_layer)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    clip = CLIPVisionModel(model.config.vision_config).eval()
    clip.load_state_dict(model.model.vision_tower.vision_tower.vision_model.state_dict())
    projector = dict(model.model.mm_projector.named_parameters())
    with torch.no_grad():
        patches = clip(pixels, output_hidden_states=True).hidden_states[select_layer][:, 1:]
        hidden = nn.functional.gelu(patches @ projector["mlp.mlp.0.weight"].T + projector["mlp.mlp.0.bias"])
        hidden = hidden @ projector["mlp.mlp.2.weight"].T + projector["mlp.mlp.2.bias"]
        # 4 x 4 patches to 2 x 2 tokens: the mean of each 2 x 2 block.
        pooled = hidden.view(2, 2, 2, 2, 2, 32).mean(dim=(2, 4)).permute(0, 3, 1, 2)
        kernel, bias = projector["peg.peg.0.weight"], projector["peg.peg.0.bias"]
        positioned = nn.functional.conv2d(pooled, kernel, bias, padding=1, groups=32) + pooled
        by_hand = positioned.flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.encode_images(pixels), by_hand, atol=1e-5, rtol=1e-5)
        assert torch.equal(
            model.encode_images(patch_features=model.get_patch_features(pixels)), model.encode_images(pixels)
        )


def test_tower_layers_after_the_selected_one_never_run_and_do_not_matter(tiny_model):
    model = tiny_model()
    pixels = torch.randn(1, 3, 56, 56)
    before = model.encode_images(pixels)
    tower = model.model.vision_tower.vision_tower.vision_model

    def never(*_):
        raise AssertionError("a layer after the selected one ran")

    for module in (tower.encoder.layers[-1], tower.post_layernorm):
        module.register_forward_hook(never)
        for parameter in module.parameters():
            parameter.data.normal_(std=100)
    assert torch.equal(model.encode_images(pixels), before)


@pytest.mark.parametrize("heads", HEADS)
def test_a_sample_has_the_same_logits_alone_and_in_a_padded_batch(heads, tiny_model, make_batch, split_batch):
    model, batch = tiny_model(**heads), make_batch(*LAYOUTS)
    with torch.no_grad():
        together = model(**batch.inputs()).logits
        for row, sample in enumerate(split_batch(batch)):
            alone = model(**sample.inputs()).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-5, rtol=1e-4)


def test_what_padding_holds_does_not_matter(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS)
    garbage = batch.input_ids.masked_fill(~batch.attention_mask, 77)
    with torch.no_grad():
        clean, dirty = (
            model(**batch.inputs() | {"input_ids": ids}).logits for ids in (batch.input_ids, garbage)
        )
        real = model.merge_inputs(
            garbage, model.encode_images(batch.pixel_values), attention_mask=batch.attention_mask
        ).attention_mask
    assert not real.all() and torch.equal(clean[real], dirty[real])


def test_loss_is_the_mean_over_labels_or_as_the_trainer_counts(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS, answers=2)
    with torch.no_grad():
        output = model(**batch.inputs())
        merged = model.merge_inputs(
            batch.input_ids,
            model.encode_images(batch.pixel_values),
            attention_mask=batch.attention_mask,
            labels=batch.labels,
        )
        accumulated = model(**batch.inputs(), num_items_in_batch=torch.tensor(40)).loss
    log_probs = output.logits.log_softmax(dim=-1)
    terms = [
        -log_probs[row, column - 1, label]
        for row, column in (merged.labels != IGNORE_INDEX).nonzero().tolist()
        if (label := merged.labels[row, column]) >= 0
    ]
    assert len(terms) == 2 * len(LAYOUTS)
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())
    torch.testing.assert_close(accumulated, torch.stack(terms).sum() / 40)


def test_training_reaches_everything_but_the_tower(tiny_model, make_batch):
    model = tiny_model()
    model(**make_batch(*LAYOUTS).inputs()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {name for name, _ in model.named_parameters() if "vision_tower" not in name}
    assert reached == trained


def test_half_precision_keeps_its_type(tiny_model, make_batch):
    model, batch = tiny_model().to(torch.bfloat16), make_batch(*LAYOUTS)
    logits = model(**batch.inputs()).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("drop", [0, 1])
def test_another_number_of_images_than_placeholders_is_refused(drop, tiny_model, make_batch):
    batch = make_batch([2, IMAGE, 3], [2, IMAGE, 3])
    pixels = batch.pixel_values[:drop] if drop else None
    with pytest.raises(ImageCountError, match=f"2 image placeholders .* but {drop} images"):
        tiny_model()(**batch.inputs() | {"pixel_values": pixels})


def greedy(model, sample, num_tokens):
    """Greedy decoding without a cache: the whole prompt again for every token."""
    ids = sample.input_ids
    for _ in range(num_tokens):
        logits = model(ids, pixel_values=sample.pixel_values, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, sample.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("heads", HEADS[:2])
@pytest.mark.parametrize("layouts", [LAYOUTS, ([4], [7])], ids=["images", "text only"])
@torch.no_grad()
def test_generation_with_a_cache_is_greedy_decoding_of_each_sample_alone(
    heads, layouts, tiny_model, make_batch, split_batch
):
    model, batch = tiny_model(**heads, eos_token_id=None), make_batch(*layouts)
    together = model.generate(
        batch.input_ids,
        pixel_values=batch.pixel_values,
        attention_mask=batch.attention_mask,
        max_new_tokens=5,
        do_sample=False,
    ).tolist()
    one_by_one = [greedy(model, sample, 5) for sample in split_batch(batch)]
    assert together == one_by_one and len({tuple(tokens) for tokens in together}) > 1


def test_prompts_padded_on_the_left_generate_the_same(tiny_model, make_batch):
    model, batch = tiny_model(eos_token_id=None), make_batch([3, IMAGE, 5], [6])
    order = torch.argsort(batch.attention_mask.long(), dim=1, stable=True)
    left, left_mask = (x.gather(1, order) for x in (batch.input_ids, batch.attention_mask))
    assert not left_mask[1, 0]
    from_right, from_left = (
        model.generate(
            ids, pixel_values=batch.pixel_values, attention_mask=mask, max_new_tokens=4, do_sample=False
        )
        for ids, mask in ((batch.input_ids, batch.attention_mask), (left, left_mask))
    )
    assert torch.equal(from_right, from_left)


def test_generation_stops_at_the_end_token_and_pads(tiny_model, make_batch):
    model, batch = tiny_model(eos_token_id=None), make_batch([3, IMAGE, 5], [6])
    inputs = {"pixel_values": batch.pixel_values, "attention_mask": batch.attention_mask, "do_sample": False}
    free = model.generate(batch.input_ids, max_new_tokens=4, **inputs)
    end = int(free[0, 1])
    stopped = model.generate(batch.input_ids, max_new_tokens=4, eos_token_id=end, pad_token_id=0, **inputs)
    first_end = free[0].tolist().index(end)
    assert stopped[0, : first_end + 1].tolist() == free[0, : first_end + 1].tolist()
    assert not stopped[0, first_end + 1 :].any()


def test_a_copy_of_the_config_builds_the_same_model(original):
    again = MobileVLMForCausalLM(copy.deepcopy(original.config))
    shapes = {name: tensor.shape for name, tensor in again.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in original.state_dict().items()}
