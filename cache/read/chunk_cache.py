"""Decompressed chunks that samples share, kept while there is room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache

from cache.files.any_path import AnyPath
from cache.format.codec import Array
from cache.read.chunks import OpenArray, read_chunks

ChunkName = tuple[AnyPath, int]  # a shard, and the chunk's number in it


class ChunkCache:
    """Decompressed chunks, the least recently used dropped first; for one process and one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._chunks: LRUCache[ChunkName, Array] = LRUCache(limit_bytes, getsizeof=lambda rows: rows.nbytes)

    def rows(self, wanted: Sequence[tuple[OpenArray, Sequence[tuple[int, int]]]]) -> Iterator[Array]:
        """Yield of every array in turn the rows of its spans start..stop, 'rows *row_shape', not to be written to.

        All chunks that are not held are requested at once, before the first rows are given.
        """
        needed = [_pieces(array, spans) for array, spans in wanted]
        pieces = [piece for some in needed for piece in some]
        uses = Counter(piece.name for piece in pieces)
        # A chunk of which one sample takes all rows is of no use to any other, and is not kept.
        shared = {piece.name for piece in pieces if not piece.is_whole or uses[piece.name] > 1}
        # Held here too: what this call keeps may push others out of the cache before they were used.
        chunks = {name: self._chunks[name] for name in uses if name in self._chunks}
        missing = {piece.name: piece for piece in pieces if piece.name not in chunks}
        read = zip(missing, read_chunks([(one.array, one.number) for one in missing.values()]), strict=True)
        for (array, _), some in zip(wanted, needed, strict=True):
            for piece in some:
                while piece.name not in chunks:
                    name, chunk = next(read)
                    chunks[name] = chunk
                    if name in shared:
                        with suppress(ValueError):  # larger than the whole cache
                            self._chunks[name] = chunk
            yield _joined(array, [chunks[piece.name][piece.rows] for piece in some])
            for piece in some:
                if piece.name not in shared:
                    del chunks[piece.name]


class _Piece(NamedTuple):
    """The rows of a span that lie in one chunk."""

    array: OpenArray
    number: int  # of the chunk
    rows: slice
    is_whole: bool  # the span has all rows of the chunk

    @property
    def name(self) -> ChunkName:
        return self.array.shard, self.number


def _pieces(array: OpenArray, spans: Sequence[tuple[int, int]]) -> list[_Piece]:
    """Cut the spans at the borders of chunks."""
    size = array.chunk_rows
    return [
        _Piece(
            array,
            n,
            slice(max(start - n * size, 0), stop - n * size),
            is_whole=start <= n * size and (n + 1) * size <= stop,
        )
        for start, stop in spans
        for n in range(start // size, (stop - 1) // size + 1)
    ]


def _joined(array: OpenArray, pieces: Sequence[Array]) -> Array:
    """Return the rows as one array: a view of the chunk if they are of one chunk, else a copy."""
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces or [np.empty((0, *array.stored.row_shape), dtype=array.stored.dtype)])
