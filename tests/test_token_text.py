"""A single token's text, for tokenizers of LLaMA's kind and of SmolLM2's, and marks for what cannot be seen."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.inspection.token_text import token_text, visible
from pipeline.models.mobilevlm.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def llama(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def byte_level():
    """A token a byte but for one of two, and special tokens as SmolLM2 names them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate([*special, *alphabet, "Ġa"])}
    backend = Tokenizer(models.BPE(ids, [("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken("two words", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[2], unk_token=special[0]
    )


def texts(text: str, tokenizer) -> list[str]:
    return [token_text(number, tokenizer) for number in tokenizer(text).input_ids]


def test_llamas_tokens_keep_their_space_and_begin_with_a_special_one(llama):
    assert texts("What is it?\n", llama) == ["<s>", " What", " is", " it", "?", "\n"]


def test_llamas_parts_of_a_character_are_bytes(llama):
    assert texts("\U0001fae8", llama) == ["<s>", " ", "<0xF0>", "<0x9F>", "<0xAB>", "<0xA8>"]


def test_byte_level_tokens_are_text_again(byte_level):
    assert texts("<|im_start|>Is a\n", byte_level) == ["<|im_start|>", "I", "s", " a", "\n"]


def test_tokens_that_were_added_are_as_they_were_given(byte_level):
    assert texts("a two words", byte_level) == ["a", " ", "two words"]


def test_an_id_that_the_tokenizer_does_not_have_stays_a_number(llama, byte_level):
    assert [token_text(99_999, tokenizer) for tokenizer in (llama, byte_level)] == ["<99999>"] * 2


def test_byte_level_parts_of_a_character_are_bytes(byte_level):
    assert texts("é", byte_level) == ["<0xC3>", "<0xA9>"]


def test_an_id_stands_where_there_is_no_tokenizer():
    assert token_text(29871, None) == "29871"


def test_marks_stand_for_what_cannot_be_seen():
    assert visible(" a b\n") == "␣a␣b↵"
    assert visible("\t\x07\u200b") == r"\t\x07\u200b"
    assert visible("Größe 价 $<0xE4>") == "Größe␣价␣$<0xE4>"
