"""Removal of the texts and colour profiles of a PNG that Pillow refuses for their size; no pixel depends on them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
MAX_TEXT = 1024 * 1024  # decompressed bytes of one text, Pillow's limit
MAX_TEXTS = 16 * MAX_TEXT  # of all texts, a quarter of Pillow's limit: those beyond it are not decompressed


def without_large_text(data: bytes) -> bytes:
    """Return a PNG without texts and profiles of more than 1 MB each, or 16 MB in all; other bytes unchanged."""
    if not data.startswith(SIGNATURE):
        return data
    kept, copied, seen = [], 0, 0
    for name, start, stop in _chunks(data):
        if name not in TEXTS:
            continue
        size = MAX_TEXT + 1 if seen > MAX_TEXTS else _text_size(name, data[start + 8 : stop - 4])
        seen += size
        if size > MAX_TEXT:
            kept.append(data[copied:start])
            copied = stop
    return b"".join([*kept, data[copied:]]) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each chunk up to the first incomplete one; Pillow judges the rest."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        stop = start + 12 + length
        if stop > len(data):
            return
        yield name, start, stop
        start = stop


def _text_size(name: bytes, body: bytes) -> int:
    """Return the decompressed bytes of a chunk's text; `MAX_TEXT` + 1 for any larger text."""
    _, _, rest = body.partition(b"\0")
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] == b"\0"):
        return len(body)
    compressed = rest[1:]  # after the compression method
    if name == b"iTXt":  # flag, method, language, translated keyword, text
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    inflate = zlib.decompressobj()
    try:
        size = len(inflate.decompress(compressed, MAX_TEXT))
    except zlib.error:
        return 0  # Pillow ignores it
    return MAX_TEXT + 1 if inflate.unconsumed_tail else size
