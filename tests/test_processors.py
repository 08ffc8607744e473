"""Processors: loading without torchvision, one image at a time, and putting images together again."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_images import picture
from tiny_families import PARTS, write_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import dummy_mistral_common_objects

from pipeline.errors import ConfigError
from pipeline.models.families import FAMILIES
from pipeline.models.processors import Tensors, expansion_of, expansion_of_size, load_processor

# The image processor of LFM2-VL needs torchvision.
WITH_PROCESSOR = tuple(family for family in PARTS if family != "lfm2_vl")
WITHOUT_VIDEO_PART = ("llava", "llava_next", "idefics3", "gemma3", "paligemma")
SIZES = ((40, 28), (24, 60), (32, 32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(family, folder / family) for family in PARTS}


@pytest.fixture(scope="module", params=WITH_PROCESSOR)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(family, folders) -> Any:
    return load_processor(folders[family])


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(folders["qwen3_vl"], tmp_path / "checkpoint"))


def test_a_processor_is_of_its_familys_class_and_has_its_template(family, processor, folders):
    kind = json.loads((folders[family] / "preprocessor_config.json").read_text())["processor_class"]
    assert type(processor).__name__ == kind
    assert isinstance(processor, getattr(transformers, kind))
    assert (processor.chat_template is None) == (family == "paligemma")


@pytest.mark.parametrize("name", WITHOUT_VIDEO_PART)
def test_it_returns_what_auto_processor_returns_where_that_works(name, folders, monkeypatch):
    # The tests' mistral_common lacks packages; AutoProcessor imports it if it is there.
    absent = dummy_mistral_common_objects.MistralCommonBackend
    monkeypatch.setitem(vars(transformers), "MistralCommonBackend", absent)
    theirs = AutoProcessor.from_pretrained(folders[name])
    ours = load_processor(folders[name])
    text = f"{ours.image_token} a\n{ours.image_token} b"
    images = [picture(40, 28), picture(24, 60, seed=1)]
    expected, found = (p(text=[text], images=images, return_tensors="pt") for p in (theirs, ours))
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_processor_can_be_sent_to_another_process(processor):
    again = pickle.loads(pickle.dumps(processor))
    (text, pixels), (text_again, pixels_again) = (
        expansion_of(p, picture(40, 28)) for p in (processor, again)
    )
    assert text == text_again
    assert all(torch.equal(pixels[name], pixels_again[name]) for name in pixels)
    assert again.chat_template == processor.chat_template


def test_a_saved_processor_is_the_same_when_loaded_again(family, processor, folders, tmp_path):
    shutil.copy(folders[family] / "config.json", tmp_path)
    processor.save_pretrained(tmp_path)
    assert not (
        tmp_path / "preprocessor_config.json"
    ).exists()  # newer folders hold it in processor_config.json
    again = load_processor(tmp_path)
    (text, pixels), (text_again, pixels_again) = (
        expansion_of(p, picture(24, 60)) for p in (processor, again)
    )
    assert text == text_again
    assert all(torch.equal(pixels[name], pixels_again[name]) for name in pixels)


@pytest.mark.parametrize("size", SIZES)
def test_an_expansion_depends_on_the_size_alone(processor, size):
    text, pixels = expansion_of(processor, picture(*size))
    blank, blank_pixels = expansion_of_size(processor, size)
    assert blank == text
    assert processor.tokenizer(text)["input_ids"]
    assert {name: value.shape for name, value in pixels.items()} == {
        name: value.shape for name, value in blank_pixels.items()
    }
    assert not torch.equal(pixels["pixel_values"], blank_pixels["pixel_values"])


def test_a_text_with_expansions_has_the_ids_of_the_whole_processor(family, processor):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    first, second, third = (expansion_of(processor, image)[0] for image in images)
    token = processor.image_token
    whole = processor(text=[f"{token}\n\nWhat is\n{token}? {token}\n"], images=images, return_tensors="pt")
    text = f"{first}\n\nWhat is\n{second}? {third}\n"
    if family == "paligemma":  # its processor adds the begin of text after the last image, and a newline
        text = text.removesuffix("\n") + processor.tokenizer.bos_token + "\n\n"
    assert processor.tokenizer(text)["input_ids"] == whole["input_ids"][0].tolist()


def join_images(family: str, images: list[Tensors]) -> Tensors:
    """Put the tensors of single images together, as `VisionLanguageModel` does."""
    return {name: FAMILIES[family].join([image[name] for image in images]) for name in images[0]}


def test_joined_images_are_the_whole_processors(family, processor):
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    joined = join_images(family, [expansion_of(processor, image)[1] for image in images])
    whole = processor(text=[processor.image_token * 3], images=images, return_tensors="pt")
    text_only = processor.tokenizer("a", return_token_type_ids=True)
    assert set(joined) == set(whole) - set(text_only) - {"mm_token_type_ids", "labels"}
    for name, value in joined.items():
        assert value.dtype == whole[name].dtype
        assert torch.equal(value, whole[name]), name


def test_one_join_serves_a_batch_of_texts(family, processor, folders):
    """SmolVLM and Idefics3 have a row of tiles for each text; the joined row gives the same logits."""
    model = AutoModelForImageTextToText.from_pretrained(folders[family])
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    token = processor.image_token
    whole = processor(
        text=[f"{token} Is it red?", f"{token} or {token}?"],  # Qwen takes images side by side for one
        images=[images[:1], images[1:]],
        padding=True,
        return_tensors="pt",
    )
    whole.pop("labels", None)
    joined = join_images(family, [expansion_of(processor, image)[1] for image in images])
    with torch.no_grad():
        expected, found = model(**whole).logits, model(**{**whole, **joined}).logits
    assert torch.equal(found, expected)


def test_the_rule_of_lfm2_vl_keeps_the_features_of_each_image(folders):
    """Its processor needs torchvision, so the rule is compared with the model alone."""
    model = AutoModelForImageTextToText.from_pretrained(folders["lfm2_vl"])
    images = [_lfm2_tiles((4, 4), seed=0), _lfm2_tiles((2, 4), (4, 2), seed=1)]
    with torch.no_grad():
        joined = model.get_image_features(**join_images("lfm2_vl", images)).pooler_output
        alone = [tile for image in images for tile in model.get_image_features(**image).pooler_output]
    assert len(joined) == len(alone) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(joined, alone, strict=True))


def _lfm2_tiles(*grids: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """The tensors of an image: patches of each tile, padded to 16, which of them are real, and their grid."""
    real = torch.stack([torch.arange(16) < rows * columns for rows, columns in grids])
    patches = torch.randn(len(grids), 16, 48, generator=torch.Generator().manual_seed(seed))
    return {
        "pixel_values": patches * real[..., None],
        "pixel_attention_mask": real.int(),
        "spatial_shapes": torch.tensor(grids),
    }


def test_paligemmas_training_text_is_prefix_and_answer(folders):
    """What the processor makes of `suffix`, said with expansions: the answer alone has type 1 and labels."""
    processor = load_processor(folders["paligemma"])
    tokenizer, image = processor.tokenizer, picture(40, 28)
    whole = processor(
        text=[f"{processor.image_token}What is it?"], images=[image], suffix=["a circle"], return_tensors="pt"
    )
    prefix = expansion_of(processor, image)[0] + tokenizer.bos_token + "What is it?\n"
    before, answer = (tokenizer(text)["input_ids"] for text in (prefix, "a circle" + tokenizer.eos_token))
    assert whole["input_ids"][0].tolist() == before + answer
    assert whole["token_type_ids"][0].tolist() == [0] * len(before) + [1] * len(answer)
    assert whole["labels"][0].tolist() == [-100] * len(before) + answer


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("tokenizer.json", "tokenizer_config.json"), r"no tokenizer, expected one of tokenizer\.json"),
        (("preprocessor_config.json",), r"no image processor, expected preprocessor_config\.json"),
        (("config.json",), r"config\.json: .*; name a folder that holds a checkpoint"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(missing, message, copy):
    for name in missing:
        (copy / name).unlink()
    with pytest.raises(ConfigError, match=rf"^{copy}: {message}"):
        load_processor(copy)


@pytest.mark.parametrize(
    ("broken", "part"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "the tokenizer"),
        ("preprocessor_config.json", "the image processor"),
        ("processor_config.json", "the image processor"),
    ],
)
def test_a_file_that_is_cut_is_one_sentence(broken, part, copy):
    (copy / broken).write_text('{"a": ')
    with pytest.raises(ConfigError, match=rf"^{copy}: {part}: "):
        load_processor(copy)


def test_a_missing_package_is_named(folders, monkeypatch):
    needs = r"the image processor needs a package: Lfm2VlImageProcessor requires the Torchvision library"
    with pytest.raises(ConfigError, match=needs):
        load_processor(folders["lfm2_vl"])
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ConfigError, match=r"the processor needs a package: Package `num2words` is required"):
        load_processor(folders["smolvlm"])


def test_a_model_without_a_processor_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(ConfigError, match="transformers has none for models of type 'opt'"):
        load_processor(copy)


def test_a_processor_with_other_parts_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    with pytest.raises(ConfigError, match=r"neither text nor images \(feature_extractor\)"):
        load_processor(copy)


def test_code_that_came_with_a_checkpoint_does_not_run(copy):
    marker = copy / "it_ran"
    (copy / "remote.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
        file = copy / name
        fields = json.loads(file.read_text()) if file.is_file() else {}
        autos = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
        file.write_text(json.dumps(fields | {"auto_map": {auto: "remote.Evil" for auto in autos}}))
    processor = load_processor(copy)
    assert expansion_of(processor, picture(40, 28))[0]
    assert not marker.exists()
