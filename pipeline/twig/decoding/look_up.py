"""Drafts without a model: what followed the same few tokens earlier in the text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


def following_of_last_match(text: Sequence[int], length: int, most: int) -> list[int]:
    """Return at most `most` tokens that followed the last earlier occurrence of the text's last `length` tokens.

    Negative ids stand for what is no text, such as vision tokens: none is returned, nor what follows it. Prompt
    look-up decoding (Saxena 2023; `prompt_lookup_num_tokens` of transformers).
    """
    if len(text) <= length or length < 1:
        return []
    end = list(text[-length:])
    for start in range(len(text) - length - 1, -1, -1):
        if list(text[start : start + length]) == end:
            return list(takewhile(lambda token: token >= 0, text[start + length : start + length + most]))
    return []
