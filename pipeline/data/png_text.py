"""A PNG without the texts and colour profiles that Pillow refuses for their size: no pixel depends on them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
MAX_TEXT = 1024 * 1024  # Pillow's own limit for one of them, decompressed
MAX_TEXTS = 16 * MAX_TEXT  # a quarter of Pillow's: what is left out is not decompressed either


def without_large_text(data: bytes) -> bytes:
    """The PNG without texts and profiles of more than 1 MB each, or 16 MB in all; other bytes as they are."""
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
    """Name, start and end of each whole chunk; what follows the first that is not whole is Pillow's to judge."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        stop = start + 12 + length
        if stop > len(data):
            return
        yield name, start, stop
        start = stop


def _text_size(name: bytes, body: bytes) -> int:
    """Bytes of a chunk's text, decompressed; `MAX_TEXT` + 1 stands for any larger one."""
    _, _, rest = body.partition(b"\0")
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] == b"\0"):
        return len(body)
    compressed = rest[1:]  # after the method
    if name == b"iTXt":  # flag, method, language, translated keyword, text
        compressed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    inflate = zlib.decompressobj()
    try:
        size = len(inflate.decompress(compressed, MAX_TEXT))
    except zlib.error:
        return 0  # Pillow passes over it
    return MAX_TEXT + 1 if inflate.unconsumed_tail else size
