"""The study's tokenizer: one token a word or mark, and SmolLM2's special tokens, which `chatml` needs."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.templates import CHATML_ROLES, TURN_END, TURN_START
from pipeline.studies.scenes.texts import all_words

UNKNOWN = "<|endoftext|>"  # also the padding
SPECIAL_TOKENS = (UNKNOWN, TURN_START, TURN_END)
ROLES = tuple(CHATML_ROLES[speaker].strip() for speaker in ("human", "gpt"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer. Its ids are the special tokens, the two roles, and the sorted words."""
    vocabulary = [*SPECIAL_TOKENS, *ROLES, *all_words()]
    ids = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)  # no space before a mark
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=TURN_START,
        eos_token=TURN_END,
        unk_token=UNKNOWN,
        pad_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
