"""The text of a single token, and a visible form of its spaces and control characters."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACE = "\u2581"  # stands for a space in sentencepiece


def token_text(number: int, tokenizer: Any) -> str:
    """Return a token's text with its leading space; part of a character as bytes; without a tokenizer, the id."""
    if tokenizer is None:
        return str(number)
    piece = tokenizer.convert_ids_to_tokens(number)
    if piece is None:  # models may have more ids than their tokenizer
        return f"<{number}>"
    if number in tokenizer.added_tokens_decoder:
        return piece
    return _byte_level(piece) if _is_byte_level(tokenizer) else _sentencepiece(piece)


def visible(text: str) -> str:
    """Return the text with a mark for every space and line break, and an escape for other invisible characters."""
    marks = {" ": "␣", "\n": "↵"}
    return "".join(marks.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def _sentencepiece(piece: str) -> str:
    byte = re.fullmatch("<0x([0-7][0-9A-F])>", piece)  # from 0x80 on, part of a character
    return chr(int(byte[1], 16)) if byte else piece.replace(SPACE, " ")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the characters of a tokenizer's pieces stand for bytes, as GPT-2's do."""
    return SPACE not in "".join(
        tokenizer.convert_ids_to_tokens(tokenizer("a b", add_special_tokens=False).input_ids)
    )


def _byte_level(piece: str) -> str:
    """Decode a piece whose characters stand for bytes; a byte of an incomplete character becomes <0xE4>."""
    if any(character not in _bytes() for character in piece):
        return piece
    data = bytes(_bytes()[character] for character in piece)
    escaped = data.decode(errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in escaped)


@cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}
