"""The tokenizer equals sentencepiece, and one that would change prompts or labels is refused."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from pipeline.data.tokenizer_digest import tokenizer_digest
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm.tokenizer import load_tokenizer

SOURCE = Path(__file__).read_text().splitlines()
WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "what colour is the fox? brown.",
    "USER: ASSISTANT: yes no",
]


def train(folder: Path, *, sentences: Iterable[str] = WORDS * 20, **options) -> Path:
    """A small sentencepiece model, LLaMA-like unless told otherwise."""
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    defaults |= {"remove_extra_whitespaces": False, "vocab_size": 340, "minloglevel": 2, "num_threads": 1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **(defaults | options)
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(spec.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def mistral_pair(mistral):
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(mistral / "tokenizer.model"))
    return load_tokenizer(mistral), oracle


@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        st.text(st.sampled_from(list("etaoin  TH\n.,:|#(01é漢")), max_size=60),
    ).filter(lambda text: not any(special in text for special in ("<s>", "</s>", "<unk>")))
)
def test_ids_are_those_of_sentencepiece(mistral_pair, text):
    tokenizer, oracle = mistral_pair
    assert tokenizer(text).input_ids == [1, *oracle.encode(text)]


def test_a_small_trained_vocabulary_is_read_alike(tmp_path):
    folder = train(tmp_path / "small")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for text in [*WORDS, "  brown\n\nfox ", "Größe 漢"]:
        assert tokenizer(text).input_ids == [1, *oracle.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_padding_is_unk_on_the_right(mistral_pair):
    tokenizer, _ = mistral_pair
    padded = tokenizer(["a b c d", "a"], padding=True)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert padded["attention_mask"][1][0] == 1 and padded["attention_mask"][1][-1] == 0


def test_a_saved_tokenizer_reads_back_the_same(mistral_pair, tmp_path):
    tokenizer, _ = mistral_pair
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    again = load_tokenizer(tmp_path)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    assert again(" grabbed").input_ids == tokenizer(" grabbed").input_ids


def test_digests_tell_vocabularies_apart(mistral_pair, tmp_path):
    small = load_tokenizer(train(tmp_path / "small"))
    other = load_tokenizer(train(tmp_path / "other", vocab_size=341))
    assert len({tokenizer_digest(t) for t in (small, other, mistral_pair[0])}) == 3


def test_a_tokenizer_that_transformers_5_saved_is_refused(mistral, tmp_path):
    LlamaTokenizer.from_pretrained(mistral, legacy=False, add_bos_token=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(
        ConfigError, match=r"differ from MobileVLM's; use the checkpoint's own tokenizer.model"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"model_type": "unigram", "sentences": SOURCE, "vocab_size": 600},
            "is not a LLaMA-like sentencepiece model",
        ),
        ({"normalization_rule_name": "nmt_nfkc"}, "is not a LLaMA-like sentencepiece model"),
        ({"bos_id": -1}, "lacks <s>, </s> or <unk>"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_tokenizer(train(tmp_path / "model", **options))


def word_level(*, bos: bool, **special: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "Yes", "No", ".", "USER", "ASSISTANT", ":"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


ALL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("tokenizer", "complaint"),
    [
        (word_level(bos=True, unk_token="<unk>"), "has no <s> and no </s> token"),
        (word_level(bos=False, **ALL), "does not begin texts with <s>"),
        (word_level(bos=True, **ALL), "drops a leading space"),
    ],
)
def test_a_tokenizer_unlike_llamas_is_refused(tmp_path, tokenizer, complaint):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"needs tokenizer.model or tokenizer.json, found config.json"):
        load_tokenizer(tmp_path)


def test_a_broken_sentencepiece_file_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(
        ConfigError, match=r"tokenizer.model: not readable as a tokenizer .*; copy or download"
    ):
        load_tokenizer(tmp_path)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no/such/folder': no such local folder"):
        load_tokenizer(tmp_path / "no/such/folder")
