"""The tiny checkpoints load as published ones do, and are what other tests take them for."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from family_images import SIZES, picture, write_shards
from PIL import Image
from safetensors.torch import load_file
from tiny_families import FAMILIES, PARTS, write_checkpoint
from tiny_tokenizers import SPECIAL_TOKENS
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Sample, read_shard
from pipeline.models.processors import load_processor

pytestmark = pytest.mark.slow

WITH_PROCESSOR = tuple(family for family in PARTS if family != "lfm2_vl")  # that one's needs torchvision
OF_EACH_SIZE = ("llava_next", "internvl", "smolvlm", "idefics3", "qwen2_5_vl", "qwen3_vl")
ANY_TEXT = "Hello, {world}!  <html> a\tb\n\n  c' ~ \x01"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family that transformers knows. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(family, folder / family) for family in PARTS}


@pytest.mark.parametrize("size", [{}, {"num_hidden_layers": 3, "hidden_size": 24}])
@pytest.mark.parametrize("family", PARTS)
def test_every_weight_is_loaded(family, size, tmp_path):
    folder = write_checkpoint(family, tmp_path, **size)
    assert AutoConfig.from_pretrained(folder).model_type == family
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    text = model.config.get_text_config()
    assert {name: getattr(text, name) for name in size} == size
    assert len(model.get_decoder().layers) == text.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_weights_and_leaves_torchs_generator_alone(family, tmp_path):
    torch.manual_seed(1)
    first, again, other = (
        load_file(write_checkpoint(family, tmp_path / str(n), seed=seed) / "model.safetensors")
        for n, seed in enumerate((3, 3, 4))
    )
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", PARTS)
def test_the_tokenizer_keeps_every_text_and_has_each_special_token_as_one_id(family, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert tokenizer.decode(tokenizer(ANY_TEXT, add_special_tokens=False)["input_ids"]) == ANY_TEXT
    special = SPECIAL_TOKENS[family]
    for token in special.all():
        assert len(tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]) == 3, token
    config = AutoConfig.from_pretrained(folders[family])
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(special.image)
    assert len(tokenizer) <= config.get_text_config().vocab_size
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == special.adds_bos


@pytest.fixture(scope="module", params=WITH_PROCESSOR)
def two_images(request, folders) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and its inputs: a text with two images of different sizes."""
    folder = folders[request.param]
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
    processor = load_processor(folder)
    text = f"{processor.image_token} Describe the image. {processor.image_token} The image is"
    inputs = processor(text=[text], images=[picture(40, 28), picture(24, 60)], return_tensors="pt")
    return model, {name: value for name, value in inputs.items() if name != "labels"}


def test_every_layer_attends_far_from_evenly(two_images):
    model, inputs = two_images
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 4
    for rows in attentions:
        last = rows[0, :, -1]  # the last query sees every token, or a whole window
        seen = last[last > 0].view(last.shape[0], -1)
        assert (seen.amax(-1) > 1.5 * seen.mean(-1)).all()


def test_the_image_changes_the_last_logits(two_images):
    model, inputs = two_images
    with torch.no_grad():
        seen = model(**inputs).logits[0, -1]
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits[0, -1]
    assert (seen - other).abs().max() > 0.1


def test_there_are_as_many_image_tokens_as_features(two_images):
    model, inputs = two_images
    takes = inspect.signature(model.get_image_features).parameters
    with torch.no_grad():
        features = model.get_image_features(**{n: v for n, v in inputs.items() if n in takes}).pooler_output
    width = model.config.get_text_config().hidden_size
    number = sum(image.numel() for image in features) // width
    assert number == (inputs["input_ids"] == model.config.image_token_id).sum() < 200


@pytest.mark.parametrize("family", WITH_PROCESSOR)
def test_the_number_of_tokens_differs_from_size_to_size_where_the_family_does_that(family, folders):
    processor = load_processor(folders[family])
    token = AutoConfig.from_pretrained(folders[family]).image_token_id
    inputs = [
        processor(text=[processor.image_token], images=[picture(*size)], return_tensors="pt")
        for size in ((40, 28), (24, 60))
    ]
    wide, tall = (int((one["input_ids"] == token).sum()) for one in inputs)
    assert (wide != tall) == (family in OF_EACH_SIZE)
    assert 0 < wide < 100 and 0 < tall < 100


@pytest.mark.parametrize("family", [family for family in WITH_PROCESSOR if family != "paligemma"])
def test_the_template_writes_a_conversation_that_starts_with_its_prompt(family, folders):
    processor = load_processor(folders[family])
    question = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "a circle"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    whole = processor.apply_chat_template(question + answer)
    assert prompt.count(processor.image_token) == 1
    assert "What is it?" in prompt and "a circle" not in prompt
    assert whole.startswith(prompt) and whole.removeprefix(prompt).strip().startswith("a circle")


def test_lfm2_vl_runs_on_inputs_that_no_processor_made(folders):
    model = AutoModelForImageTextToText.from_pretrained(folders["lfm2_vl"])
    ids = torch.tensor([[1, 200, *[model.config.image_token_id] * 4, 201, 202]])
    images = {
        "pixel_values": torch.randn(1, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }
    with torch.no_grad():
        features = model.get_image_features(**images).pooler_output
        logits = model(input_ids=ids, **images).logits
    assert sum(len(image) for image in features) == 4
    assert logits.isfinite().all()


def test_the_shards_hold_images_of_three_sizes_and_samples_with_none_one_and_two(tmp_path):
    shards = expand_shards(str(write_shards(tmp_path)))
    samples = [sample for shard in shards for sample in read_shard(shard)]
    assert all(isinstance(sample, Sample) for sample in samples)
    sizes = {s.key.split("/")[-1]: [Image.open(io.BytesIO(i)).size for i in s.images] for s in samples}
    wide, tall, square = SIZES
    assert sizes == {
        "wide": [wide],
        "tall": [tall],
        "square": [square],
        "text": [],
        "two": [wide, tall],
        "late": [square],
    }
