"""MobileVLM V2 is asked with the original's prompt, letter by letter, on every benchmark."""

from __future__ import annotations

import pytest
from benchmark_files import OFFICIAL
from small_experiment import picture

from pipeline.benchmarks.answering import prompt_of
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.config.config import DataConfig
from pipeline.data.images import ImagePreprocessor
from pipeline.data.template_preparation import TemplatePreparation
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.models.mobilevlm.tokenizer import load_tokenizer

# Written by hand from the original's conversation.py and scripts of evaluation; S and L are the suffixes.
START = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n"
)
S = "\nAnswer the question using a single word or phrase. ASSISTANT:"
L = "\nAnswer with the option's letter from the given choices directly. ASSISTANT:"
ORIGINAL = {
    "gqa": ("201", "Is it overcast?" + S),
    "scienceqa": ("5", "Context: Look closely.\nWhich is it?\nA. one\nB. two" + L),
    "textvqa": ("34602", "What brand is this?\nReference OCR token: DAKOTA, 1.5" + S),
    "textvqa-no-ocr": ("34602", "What brand is this?" + S),
    "pope": ("random/0", "Is there a snowboard in the image?" + S),
    "mme": ("existence/0001.jpg Is it red?", "Is it red?" + S),
    "mmbench": ("241", 'A "hint"\nof two lines\nWhich colour?\nA. red\nB. green\nC. blue' + L),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_prompt_is_the_originals(name, fixture_folder, tokenizer_folder, tmp_path):
    OFFICIAL[name.removesuffix("-no-ocr")](tmp_path)
    folder = BENCHMARKS[name].folder(tmp_path)
    assert folder is not None
    tokenizer = load_tokenizer(tokenizer_folder)
    preparation = TemplatePreparation.with_images(
        ImagePreprocessor.from_pretrained(fixture_folder, aspect_ratio="pad", image_size=336),
        DataConfig(shards="none"),
        tokenizer=tokenizer,
        num_vision_tokens=1,
    )
    key, text = ORIGINAL[name]
    question = next(one for one in BENCHMARKS[name].read(folder) if one.id == key)
    # The original tokenises what stands before and behind the image apart, and keeps one token of the beginning.
    before, behind = ([*tokenizer(part).input_ids] for part in (START + text).split("<image>"))
    assert before[0] == behind[0] == tokenizer.bos_token_id
    asked = prompt_of(preparation, question, picture(0))
    assert list(asked.input_ids) == [*before, IMAGE_TOKEN_ID, *behind[1:]]
