"""Decompressed chunks that neighbours share, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cache.files.place import Place
from cache.format.codecs import Array
from cache.read.chunks import OpenArray, read_chunks

ChunkName = tuple[Place, int]  # a shard, and the chunk's number in it


class ChunkCache:
    """Decompressed chunks, the least recently used dropped first; one process, one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._chunks: OrderedDict[ChunkName, Array] = OrderedDict()

    def rows(self, wanted: Sequence[tuple[OpenArray, Sequence[tuple[int, int]]]]) -> Iterator[Array]:
        """Of every array in turn the rows of its spans start..stop, in their order.

        What is not held is asked for at once, all of it, before the first rows are given.
        """
        needed = [_pieces(array, spans) for array, spans in wanted]
        named = _named(piece for some in needed for piece in some)
        chunks = self._held(named)
        missing = [piece for name, piece in named.items() if name not in chunks]
        fresh = zip(missing, read_chunks([(piece.array, piece.number) for piece in missing]), strict=True)
        for (array, _), some in zip(wanted, needed, strict=True):
            while any(piece.name not in chunks for piece in some):
                piece, rows = next(fresh)
                chunks[piece.name] = rows
                if piece.is_shared:
                    self._keep(piece.name, rows)
            yield _joined(array, [chunks[piece.name][piece.rows] for piece in some])
            for piece in some:
                if not named[piece.name].is_shared:
                    del chunks[piece.name]

    def _held(self, names: Iterable[ChunkName]) -> dict[ChunkName, Array]:
        """Those of the chunks that are here; the cache may drop some of them again, this answer keeps them."""
        found = {name: self._chunks[name] for name in names if name in self._chunks}
        for name in found:
            self._chunks.move_to_end(name)
        return found

    def _keep(self, name: ChunkName, rows: Array) -> None:
        if name not in self._chunks:  # another reading, begun before this one ended, may have brought it
            self._chunks[name] = rows
            self._held_bytes += rows.nbytes
        while self._held_bytes > self._limit_bytes:
            self._held_bytes -= self._chunks.popitem(last=False)[1].nbytes


class _Piece(NamedTuple):
    """Rows that a span has in one chunk. The chunk is shared if it has others, such as a neighbour's."""

    name: ChunkName
    array: OpenArray
    number: int
    rows: slice
    is_shared: bool


def _pieces(array: OpenArray, spans: Sequence[tuple[int, int]]) -> list[_Piece]:
    """The spans cut at the borders of chunks."""
    size, shard = array.chunk_rows, array.shard
    return [
        _Piece(
            (shard, n),
            array,
            n,
            slice(max(start - n * size, 0), stop - n * size),
            n * size < start or (n + 1) * size > stop,
        )
        for start, stop in spans
        for n in range(start // size, (stop - 1) // size + 1)
    ]


def _named(pieces: Iterable[_Piece]) -> dict[ChunkName, _Piece]:
    """One piece of each chunk, by the chunk's name; a chunk that comes twice is shared."""
    named: dict[ChunkName, _Piece] = {}
    for piece in pieces:
        named[piece.name] = piece._replace(is_shared=piece.is_shared or piece.name in named)
    return named


def _joined(array: OpenArray, pieces: Sequence[Array]) -> Array:
    """A copy only where the rows are of several chunks; else a view of the one that they are in."""
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces or [np.empty((0, *array.stored.row_shape), dtype=array.stored.dtype)])
