"""The digest of a tokenizer of any family, for the fingerprint."""

from __future__ import annotations

import json

from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from pipeline.models.mobilevlm.tokenizer import PROBES


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the blake3 of a tokenizer's vocabulary, its special ids, and its ids of fixed texts."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id]
    probes = [tokenizer(text).input_ids for text in (*PROBES, "Yes.</s>USER: No.")]
    return blake3(json.dumps([vocabulary, special, probes]).encode()).hexdigest()
