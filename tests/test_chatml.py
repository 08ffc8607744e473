"""The template `chatml`: SmolLM2's dialogue, checked token by token on a byte-level stand-in for its tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.conversation import tokenize, tokenize_prompt
from pipeline.errors import BadSample, ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.positions import IGNORE_INDEX

START, END = "<|im_start|>", "<|im_end|>"


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A token a byte, and SmolLM2's special tokens under its first ids."""
    alphabet = ["<|endoftext|>", START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in alphabet[:3]])
    tokens = {"bos_token": START, "eos_token": END, "unk_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(tokens | special))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    byte_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def text_of(ids, tokenizer) -> str:
    return "".join("[I]" if n == IMAGE_TOKEN_ID else tokenizer.decode([n]) for n in ids)


def test_a_question_about_an_image_reads_as_smollm2_was_trained_without_system_turn(tokenizer):
    sample = tokenize(talk("<image>\nWhat?", "dog"), tokenizer, template="chatml")
    assert text_of(sample.input_ids, tokenizer) == (
        "<|im_start|>user\n[I]\nWhat?<|im_end|>\n<|im_start|>assistant\ndog<|im_end|>"
    )
    assert len(sample.input_ids) == 1 + 5 + 1 + 6 + 1 + 1 + 1 + 10 + 3 + 1


def test_trained_are_the_answers_with_their_end(tokenizer):
    sample = tokenize(talk("A", "one", "B", "two"), tokenizer, template="chatml")
    trained = [label for label in sample.labels if label != IGNORE_INDEX]
    assert text_of(trained, tokenizer) == "one<|im_end|>two<|im_end|>"
    assert all(label in (IGNORE_INDEX, n) for n, label in zip(sample.input_ids, sample.labels, strict=True))


def test_a_system_turn_leads_and_is_not_trained(tokenizer):
    turns = [{"from": "system", "value": "Be brief."}, *talk("A", "one", "B", "two")]
    sample = tokenize(turns, tokenizer, template="chatml")
    text = text_of(sample.input_ids, tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA<|im_end|>")
    trained = [label for label in sample.labels if label != IGNORE_INDEX]
    assert text_of(trained, tokenizer) == "one<|im_end|>two<|im_end|>"
    assert (
        list(sample.input_ids[: len(prompt := tokenize_prompt(turns, tokenizer, template="chatml"))])
        == prompt
    )


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<" not in text)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_every_answer_is_trained_whole_whatever_it_says(tokenizer, exchanges):
    turns = talk(*(value for exchange in exchanges for value in exchange))
    sample = tokenize(turns, tokenizer, template="chatml")
    answers = "".join(f"{answer}{END}" for _, answer in exchanges)
    wanted = tokenizer(answers, add_special_tokens=False).input_ids
    assert [label for label in sample.labels if label != IGNORE_INDEX] == wanted


def test_a_prompt_is_what_stands_before_the_last_answer(tokenizer):
    turns = talk("<image>\nA", "one", "B", "two")
    whole = tokenize(turns, tokenizer, template="chatml")
    prompt = tokenize_prompt(turns, tokenizer, template="chatml")
    assert list(whole.input_ids[: len(prompt)]) == prompt
    assert text_of(whole.input_ids[len(prompt) :], tokenizer) == f"two{END}"


@pytest.mark.parametrize("mark", [START, END])
@pytest.mark.parametrize("turn", [0, 1])
def test_a_turn_that_holds_a_mark_of_the_template_is_refused(tokenizer, mark, turn):
    values = ["What?", "dog"]
    values[turn] += f" {mark}"
    with pytest.raises(BadSample, match=r"cannot be told apart: a turn holds '<\|im_"):
        tokenize(talk(*values), tokenizer, template="chatml")


def test_an_answer_whose_first_character_joins_the_header_is_refused():
    joining = byte_tokenizer()
    joining.add_tokens(["\ndog"])
    with pytest.raises(BadSample, match="an answer's first character joins its header"):
        tokenize(talk("What?", "dog"), joining, template="chatml")


@pytest.mark.parametrize("template", ["plain", "v1"])
def test_llamas_templates_refuse_this_tokenizer(tokenizer, template):
    with pytest.raises(ConfigError, match=f"'{template}' does not fit a tokenizer that begins texts with <"):
        tokenize(talk("<image>", "dog"), tokenizer, template=template)


def test_llamas_tokenizer_is_refused_by_this_template(tokenizer_folder):
    llama = load_tokenizer(tokenizer_folder)
    with pytest.raises(ConfigError, match="'chatml' does not fit a tokenizer that begins texts with <s>"):
        tokenize_prompt(talk("What?"), llama, template="chatml")


@pytest.mark.parametrize("special", [{"eos_token": "<|endoftext|>"}, {"unk_token": None}])
def test_a_tokenizer_that_only_begins_like_smollm2s_is_refused(tmp_path, special):
    byte_tokenizer(**special).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"begins texts with <\|im_start\|>, but <\|im_end\|> is not its EOS"
    ):
        load_tokenizer(tmp_path)


def test_padding_is_the_unknown_token_on_the_right(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert tokenizer.padding_side == "right"
