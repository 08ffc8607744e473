"""Samples through a checkpoint's own processor and chat template: ids as the processor's, labels as transformers'."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import tiny_families
from family_images import picture, png
from PIL import Image

from pipeline.config.config import DataConfig
from pipeline.data.decoding import image_size
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import BadSample, ConfigError
from pipeline.positions import IGNORE_INDEX

FAMILIES = [
    family for family in tiny_families.FAMILIES if family not in ("lfm2_vl", "mobilevlm", "paligemma")
]
CHAT = DataConfig(shards="", template="chat")
TURNS = [
    {"from": "human", "value": "<image>\n<image>\nWhich one is larger?"},
    {"from": "gpt", "value": "The first."},
    {"from": "human", "value": "And this? <image>"},
    {"from": "gpt", "value": "Smaller, I think."},
]
SIZES = [(40, 28), (24, 60), (32, 32)]


@pytest.fixture(scope="module")
def preparation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = load_preparation(
                str(tiny_families.write_checkpoint(family, folder / family)), CHAT
            )
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_processor_itself(family, preparation):
    ours = preparation(family)
    sample = ours.tokenize(TURNS, SIZES)
    text = ours._render(TURNS)
    text = text.rstrip() if ours._missing_end(text) else text
    bos = ours.tokenizer.bos_token
    whole = ours.processor(
        text=[text],
        images=[picture(*size, seed) for seed, size in enumerate(SIZES)],
        add_special_tokens=not (bos is not None and text.startswith(bos)),
    )
    expected = list(whole["input_ids"][0])
    added = sample.input_ids[len(expected) :]  # an end of text where the template has none
    assert list(sample.input_ids[: len(expected)]) == expected
    assert added in ((), (ours.tokenizer.eos_token_id,))
    assert sum(sample.sizes) == sample.input_ids.count(ours.image_token_id) and len(sample.sizes) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_and_their_ends(family, preparation):
    ours = preparation(family)
    sample = ours.tokenize(TURNS, SIZES)
    trained = [label for label in sample.labels if label != IGNORE_INDEX]
    text = ours.tokenizer.decode(trained)
    assert "The first." in text and "Smaller, I think." in text
    assert all(
        words not in text for words in ("Which", "larger", "And this", "ssistant", "ASSISTANT", "model")
    )
    ends = {*ours.stop_ids, *ours.tokenizer.all_special_ids, *ours.tokenizer.added_tokens_decoder}
    assert trained[-1] in ends, "the student must learn to stop"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_the_beginning_of_its_sample(family, preparation):
    ours = preparation(family)
    sample, prompt = ours.tokenize(TURNS, SIZES), ours.prompt(TURNS, SIZES)
    assert sample.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert sample.labels[len(prompt.input_ids)] != IGNORE_INDEX
    assert prompt.sizes == sample.sizes


def test_labels_are_transformers_own_where_a_template_marks_its_answers(preparation):
    """`{% generation %}` is what transformers reads for its own mask; most published templates lack it."""
    ours = preparation("qwen3_vl")
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content[0].text }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content[0].text }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{**turn, "value": turn["value"].replace("<image>", "").strip()} for turn in TURNS]
    ours = replace(ours, expansions={})
    ours.processor.chat_template, kept = template, ours.processor.chat_template
    try:
        sample = ours.tokenize(turns)
        messages = [
            {
                "role": {"human": "user", "gpt": "assistant"}[t["from"]],
                "content": [{"type": "text", "text": t["value"]}],
            }
            for t in turns
        ]
        theirs = ours.tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
    finally:
        ours.processor.chat_template = kept
    assert list(sample.input_ids) == theirs["input_ids"]
    assert [label != IGNORE_INDEX for label in sample.labels] == [bool(m) for m in theirs["assistant_masks"]]


def with_template(ours, template: str):
    changed = replace(ours, expansions={})
    changed.processor.chat_template = template
    return changed


@pytest.fixture
def qwen(preparation):
    ours = preparation("qwen2_5_vl")
    kept = ours.processor.chat_template
    yield ours
    ours.processor.chat_template = kept


def test_a_template_that_rewrites_earlier_turns_is_refused(qwen):
    forgets = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'user' or loop.last %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"from": ("human", "gpt")[n % 2], "value": "Some words."} for n in range(4)]
    with pytest.raises(BadSample, match="writes a turn in another way once others follow"):
        with_template(qwen, forgets).tokenize(turns)
    with_template(qwen, forgets).tokenize(turns[:2])


def test_a_template_that_leaves_images_out_is_refused(qwen):
    blind = "{% for message in messages %}{{ message.content[-1].text }}<|im_end|>{% endfor %}"
    with pytest.raises(BadSample, match="the chat template writes 0, the sample has 3"):
        with_template(qwen, blind).tokenize(TURNS, SIZES)


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|image_pad|>", "<|im_start|>"])
def test_a_turn_that_holds_a_special_token_is_refused(mark, preparation):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"No {mark} here"}]
    with pytest.raises(BadSample, match="prompts and answers cannot be told apart: a turn holds"):
        preparation("qwen3_vl").tokenize(turns)


@pytest.mark.parametrize("size", [(300, 3), (1, 300), (4000, 5)])
def test_an_image_that_the_processor_refuses_or_would_misread_is_a_bad_sample(size, preparation):
    """Of 3 pixels high, the axis of the colours cannot be told; Qwen refuses an aspect ratio of 200 and more."""
    with pytest.raises(BadSample, match="image"):
        preparation("qwen3_vl").tokenize(
            [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "No."}], [size]
        )


def test_an_empty_turn_is_text(preparation):
    turns = [{"from": "human", "value": "Say nothing."}, {"from": "gpt", "value": ""}]
    for family in FAMILIES:
        assert preparation(family).tokenize(turns).input_ids, family


def test_a_template_for_text_alone_is_a_bad_sample_and_no_traceback(qwen):
    joins = "{% for message in messages %}{{ message.role + message.content }}{% endfor %}"
    with pytest.raises(BadSample, match="the chat template refuses the conversation"):
        with_template(qwen, joins).tokenize(TURNS, SIZES)


def test_a_damaged_generation_config_is_told(tmp_path):
    folder = tiny_families.write_checkpoint("llava", tmp_path / "llava")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as a generation config"):
        load_preparation(str(folder), CHAT)


def test_what_is_too_long_is_refused_by_its_length_with_vision_tokens(preparation):
    short = replace(preparation("qwen3_vl"), max_length=20)
    with pytest.raises(BadSample, match=r"positions with vision tokens, data.max_length is 20"):
        short.tokenize(TURNS, SIZES)


def test_other_families_ask_for_the_template_chat(tmp_path):
    folder = tiny_families.write_checkpoint("llava", tmp_path / "llava")
    with pytest.raises(ConfigError, match=r"set data.template: chat"):
        load_preparation(str(folder), DataConfig(shards=""))


def test_mobilevlm_has_templates_of_its_own(tmp_path):
    folder = tiny_families.write_checkpoint("mobilevlm", tmp_path / "mobilevlm")
    with pytest.raises(ConfigError, match=r"template: unknown name 'chat'"):
        load_preparation(str(folder), CHAT).tokenize(TURNS[:2])


def test_a_folder_without_a_chat_template_is_told(tmp_path):
    folder = tiny_families.write_checkpoint("llava", tmp_path / "llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_preparation(str(folder), CHAT)


def test_digests_tell_templates_processors_and_tokenizers_apart(preparation, tmp_path):
    ours = preparation("qwen3_vl").digests()
    assert (
        load_preparation(str(tiny_families.write_checkpoint("qwen3_vl", tmp_path / "same")), CHAT).digests()
        == ours
    )
    other = preparation("internvl").digests()
    assert all(ours[name] != other[name] for name in ours)
    folder = tiny_families.write_checkpoint("qwen3_vl", tmp_path / "other")
    (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + " ")
    changed = load_preparation(str(folder), CHAT).digests()
    assert {name for name in ours if ours[name] != changed[name]} == {"template"}


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_file_is_that_of_the_decoded_image(orientation, preparation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.open(io.BytesIO(png(40, 24))).convert("RGB").save(file, "JPEG", exif=exif)
    data = file.getvalue()
    ours = preparation("qwen3_vl")
    assert image_size(data) == ours.picture(data).size
    [size] = ours.sizes_of([data])
    grid = ours.preprocess(data)["image_grid_thw"][0].tolist()
    rows, columns = ours.tokenize(TURNS[:1] + TURNS[1:2], [size, size]).grids[0]
    assert (rows, columns) == (grid[1] // 2, grid[2] // 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_turn_is_in_the_text_and_not_trained(family, preparation):
    ours = preparation(family)
    turns = [{"from": "system", "value": "Be brief, always."}, *TURNS]
    sample, usual = ours.tokenize(turns, SIZES), ours.tokenize(TURNS, SIZES)
    assert "Be brief, always." in ours.tokenizer.decode(sample.input_ids)
    trained, wanted = ([label for label in one.labels if label != IGNORE_INDEX] for one in (sample, usual))
    assert trained == wanted
    prompt = ours.prompt(turns, SIZES)
    assert sample.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_a_template_that_drops_the_system_turn_refuses_the_sample(tmp_path):
    folder = tiny_families.write_checkpoint("qwen3_vl", tmp_path / "qwen3_vl")
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
        + template.read_text()
    )
    ours = load_preparation(str(folder), CHAT)
    assert ours.tokenize(TURNS, SIZES)
    with pytest.raises(BadSample, match="the template has no system turn: the chat template drops its text"):
        ours.tokenize([{"from": "system", "value": "Be brief."}, *TURNS], SIZES)


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "gemma3"])
def test_an_image_in_an_answer_is_no_label(family, preparation):
    """No model writes vision tokens, or the marks of tiles around them."""
    ours = preparation(family)
    turns = [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "See <image> here."}]
    sample = ours.tokenize(turns, SIZES[:1])
    trained = ours.tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])
    assert "See" in trained and "here." in trained
    assert ours.image_token_id not in sample.labels and "row_1" not in trained and "<img>" not in trained
    assert sum(sample.sizes) == sample.input_ids.count(ours.image_token_id) > 0
