"""MobileVLM V2: equal to the original code, blind to batching and padding, and able to generate."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers import CLIPVisionModel

from pipeline.data.preparation import pad_tokens
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.model import ImageCountError
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.shapes import ShapeError

HEADS = [{"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}]
# Early, late and adjacent images, one image, no image; lengths differ, so the batch is padded.
LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3], [9, IMAGE, 2])


def image_features(model, pixel_values):
    return model.get_image_features(pixel_values).pooler_output


@pytest.fixture(scope="module")
def ours(original, original_batch):
    """What our model computes from the original's inputs, under the original's names."""
    with torch.no_grad():
        features = image_features(original, original_batch.pixel_values)
        embeds = original.embed(original_batch["input_ids"], features)
        output = original(**original_batch.inputs(), output_hidden_states=True)
    return {
        "image_features": features,
        "inputs_embeds": embeds,
        "merged_labels": original_batch["labels"],
        "merged_attention_mask": original_batch["attention_mask"],
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


@torch.no_grad()
def test_tapped_attention_is_the_originals(original, expected, original_batch):
    vlm = VisionLanguageModel(copy.deepcopy(original))
    made = vlm.forward(original_batch, original_batch.encoded_by(vlm.encode), layers=[0, 1])
    for layer, tapped in made.attention.items():
        whole = expected[f"attention_layer{layer}"]
        for row, (text, vision) in enumerate(zip(made.slots.text, made.slots.vision, strict=True)):
            text, vision = text[text >= 0], vision[vision >= 0]
            assert len(text) and len(vision) == 144
            block = whole[row][:, text][:, :, vision]
            torch.testing.assert_close(tapped[row, :, : len(text)], block, atol=1e-4, rtol=0)
    assert list(made.attention) == [0, 1]


def test_the_towers_geometry_may_be_given_on_loading(fixture_folder, ours, expected):
    geometry = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    model = MobileVLMForCausalLM.from_pretrained(fixture_folder, vision_config=geometry)
    with torch.no_grad():
        features = image_features(model, expected["pixel_values"])
    assert torch.equal(features, ours["image_features"])


def test_the_tower_can_be_described_after_the_config_was_read(fixture_folder, expected):
    config = MobileVLMConfig.from_pretrained(fixture_folder)
    config.vision_config = json.loads((fixture_folder / "vision_tower_config.json").read_text())
    model = MobileVLMForCausalLM.from_pretrained(fixture_folder, config=config)
    features = image_features(model, expected["pixel_values"])
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
        image_features(tiny_model(mm_vision_select_feature="cls_patch"), torch.zeros(1, 3, 56, 56))


def test_images_of_another_size_are_refused(tiny_model):
    with pytest.raises(ShapeError, match="pixel_values: expected axes 'I 3 56 56', found shape"):
        image_features(tiny_model(), torch.zeros(1, 3, 28, 28))


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
        found = image_features(model, pixels)
        torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)
        again = model.get_image_features(patch_features=model.get_patch_features(pixels)).pooler_output
        assert torch.equal(again, found)


def test_tower_layers_after_the_selected_one_never_run_and_do_not_matter(tiny_model):
    model = tiny_model()
    pixels = torch.randn(1, 3, 56, 56)
    before = image_features(model, pixels)
    tower = model.model.vision_tower.vision_tower.vision_model

    def never(*_):
        raise AssertionError("a layer after the selected one ran")

    for module in (tower.encoder.layers[-1], tower.post_layernorm):
        module.register_forward_hook(never)
        for parameter in module.parameters():
            parameter.data.normal_(std=100)
    assert torch.equal(image_features(model, pixels), before)


@pytest.mark.parametrize("heads", HEADS)
def test_a_sample_has_the_same_logits_alone_and_in_a_padded_batch(heads, tiny_model, make_batch):
    model, batch = tiny_model(**heads), make_batch(*LAYOUTS)
    with torch.no_grad():
        together = model(**batch.inputs()).logits
        for row, sample in enumerate(batch.one_by_one()):
            alone = model(**sample.inputs()).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=2e-5, rtol=1e-4)


def test_what_padding_holds_does_not_matter(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS)
    real = batch["attention_mask"].bool()
    garbage = batch["input_ids"].masked_fill(~real, 77)
    with torch.no_grad():
        clean, dirty = (
            model(**batch.inputs() | {"input_ids": ids}).logits for ids in (batch["input_ids"], garbage)
        )
    assert not real.all() and torch.equal(clean[real], dirty[real])


def test_loss_is_the_mean_over_labels_or_as_the_trainer_counts(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS, answers=2)
    with torch.no_grad():
        output = model(**batch.inputs())
        accumulated = model(**batch.inputs(), num_items_in_batch=torch.tensor(40)).loss
    log_probs, labels = output.logits.log_softmax(dim=-1), batch["labels"]
    terms = [
        -log_probs[row, column - 1, labels[row, column]]
        for row, column in (labels != IGNORE_INDEX).nonzero().tolist()
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


def test_images_given_as_features_are_the_same_as_pixels(tiny_model, make_batch):
    model, batch = tiny_model(), make_batch(*LAYOUTS)
    features = {"image": model.get_image_features(batch.pixel_values)}
    given = model(batch["input_ids"], batch["attention_mask"], mm_encoder_outputs=features).logits
    assert torch.equal(given, model(**batch.inputs()).logits)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_another_number_of_images_than_image_tokens_is_refused(num_images, tiny_model, make_batch):
    batch = make_batch([2, IMAGE, 3], [2, IMAGE, 3])
    pixels = torch.zeros(num_images, 3, 56, 56) if num_images else None
    said = rf"8 image tokens \(-200\), its images have {4 * num_images} vision tokens; write 4 for each image"
    with pytest.raises(ImageCountError, match=said):
        tiny_model()(**batch.inputs() | {"pixel_values": pixels})


def left_padded(batch):
    return batch | pad_tokens([tokens for tokens, _ in batch.samples], IMAGE, on_the_left=True)


def generate(model, batch, **settings):
    """Return what the door generates of the prompts that a batch's samples are."""
    vlm = VisionLanguageModel(model)
    return vlm.generate(left_padded(batch), batch.encoded_by(vlm.encode), do_sample=False, **settings)


def greedy(model, sample, num_tokens):
    """Greedy decoding without a cache: the whole prompt again for every token."""
    ids = sample["input_ids"]
    for _ in range(num_tokens):
        logits = model(ids, pixel_values=sample.pixel_values, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, sample["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("heads", HEADS[:2])
@pytest.mark.parametrize("layouts", [LAYOUTS, ([4], [7])], ids=["images", "text only"])
@torch.no_grad()
def test_generation_with_a_cache_is_greedy_decoding_of_each_sample_alone(
    heads, layouts, tiny_model, make_batch
):
    model, batch = tiny_model(**heads, eos_token_id=None), make_batch(*layouts)
    together = generate(model, batch, max_new_tokens=5).tolist()
    one_by_one = [greedy(model, sample, 5) for sample in batch.one_by_one()]
    assert together == one_by_one and len({tuple(tokens) for tokens in together}) > 1


def test_generation_takes_pixels_and_returns_the_prompt_with_the_answer(tiny_model, make_batch):
    model, batch = tiny_model(eos_token_id=None), make_batch([3, IMAGE, 5], [6])
    inputs = {name: left_padded(batch)[name] for name in ("input_ids", "attention_mask")}
    made = model.generate(**inputs, pixel_values=batch.pixel_values, max_new_tokens=4, do_sample=False)
    prompt, answer = made.split([inputs["input_ids"].shape[1], 4], dim=1)
    assert torch.equal(prompt, inputs["input_ids"])
    assert torch.equal(answer, generate(model, batch, max_new_tokens=4))


def test_generation_stops_at_the_end_token_and_pads(tiny_model, make_batch):
    model, batch = tiny_model(eos_token_id=None), make_batch([3, IMAGE, 5], [6])
    free = generate(model, batch, max_new_tokens=4)
    end = int(free[0, 1])
    stopped = generate(model, batch, max_new_tokens=4, eos_token_id=end, pad_token_id=0)
    first_end = free[0].tolist().index(end)
    assert stopped[0, : first_end + 1].tolist() == free[0, : first_end + 1].tolist()
    assert not stopped[0, first_end + 1 :].any()


def test_a_copy_of_the_config_builds_the_same_model(original):
    again = MobileVLMForCausalLM(copy.deepcopy(original.config))
    shapes = {name: tensor.shape for name, tensor in again.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in original.state_dict().items()}
