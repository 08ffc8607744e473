"""Drafts without a model: what followed the same few tokens earlier in the text."""

from __future__ import annotations

from collections.abc import Sequence


def following_of_last_match(text: Sequence[int], length: int, most: int) -> list[int]:
    """Return at most `most` tokens that followed the last earlier occurrence of the text's last `length` tokens.

    Prompt look-up decoding (Saxena 2023, in transformers as `prompt_lookup_num_tokens`).
    """
    if len(text) <= length or length < 1:
        return []
    end = list(text[-length:])
    for start in range(len(text) - length - 1, -1, -1):
        if list(text[start : start + length]) == end:
            return list(text[start + length : start + length + most])
    return []
