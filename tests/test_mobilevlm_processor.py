"""MobileVLM V2 through transformers' Auto classes: processor, model and generation, as of any other family."""

from __future__ import annotations

import json

import pytest
import tiny_families
import torch
from family_images import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline.data.templates import TEMPLATES
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM, MobileVLMProcessor

TURNS = [
    {"from": "human", "value": "<image>\n<image>\nWhich one is green?"},
    {"from": "gpt", "value": "The first."},
    {"from": "human", "value": "And <image> this?"},
    {"from": "gpt", "value": "No."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_families.write_checkpoint("mobilevlm", tmp_path_factory.mktemp("m") / "mobilevlm")


def messages(turns) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    made = []
    for turn in turns:
        value = turn["value"]
        images = [{"type": "image"}] * value.count("<image>")
        text = value.replace("<image>", "").strip()
        made.append({"role": roles[turn["from"]], "content": [*images, {"type": "text", "text": text}]})
    return made


def test_the_auto_classes_know_it(folder):
    assert isinstance(AutoProcessor.from_pretrained(folder), MobileVLMProcessor)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), MobileVLMForCausalLM)


@pytest.mark.parametrize("length", [2, 4])
def test_the_chat_template_is_the_originals_dialogue(folder, length):
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages(TURNS[:length]), tokenize=False)
    assert text == TEMPLATES["v1"].render(TURNS[:length])
    prompt = processor.apply_chat_template(messages(TURNS[:1]), tokenize=False, add_generation_prompt=True)
    assert prompt == TEMPLATES["v1"].render_prompt(TURNS[:1])


def test_the_whole_of_transformers_own_loop_runs(folder):
    """Processor, model and `generate` as in any model card, two prompts of different lengths in one batch."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        processor.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True)
        for turns in (TURNS[:1], TURNS[:3])
    ]
    pictures = [picture(40, 28, seed=seed) for seed in range(5)]
    inputs = processor(images=pictures, text=texts)
    assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum() == 5 * model.config.num_vision_tokens
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for text, images, made in zip(texts, (pictures[:2], pictures[2:]), together, strict=True):
        alone = processor(images=images, text=text)
        answer = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert answer.tolist() == made.tolist()


def test_a_missing_image_is_told(folder):
    with pytest.raises(ConfigError, match="name 2 images, 1 are given"):
        AutoProcessor.from_pretrained(folder)(images=picture(8, 8), text="<image> and <image>")


def test_saved_configs_hold_no_image_token(folder):
    assert "image_token_id" not in json.loads((folder / "config.json").read_text())
