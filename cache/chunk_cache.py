"""Decompressed chunks that neighbours share, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cache.chunks import OpenArray, read_chunks
from cache.codecs import Array
from cache.place import Place

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
        needed = [_chunks_of(array, spans) for array, spans in wanted]
        named = _named(chunk for some in needed for chunk in some)
        chunks = self._held(named)
        missing = [chunk for name, chunk in named.items() if name not in chunks]
        fresh = zip(missing, read_chunks([(chunk.array, chunk.number) for chunk in missing]), strict=True)
        for (array, spans), some in zip(wanted, needed, strict=True):
            while any(chunk.name not in chunks for chunk in some):
                chunk, rows = next(fresh)
                chunks[chunk.name] = rows
                if chunk.is_shared:
                    self._keep(chunk.name, rows)
            yield _joined(array, spans, chunks)
            for chunk in some:
                if not named[chunk.name].is_shared:
                    del chunks[chunk.name]

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


class _Chunk(NamedTuple):
    """One chunk of an array that spans need; shared if it has rows beside those of a span, such as a neighbour's."""

    name: ChunkName
    array: OpenArray
    number: int
    is_shared: bool


def _named(chunks: Iterable[_Chunk]) -> dict[ChunkName, _Chunk]:
    """Each chunk once, by its name; one that comes twice is shared."""
    named: dict[ChunkName, _Chunk] = {}
    for chunk in chunks:
        named[chunk.name] = chunk._replace(is_shared=chunk.is_shared or chunk.name in named)
    return named


def _chunks_of(array: OpenArray, spans: Sequence[tuple[int, int]]) -> list[_Chunk]:
    size, shard = array.chunk_rows, array.shard
    return [
        _Chunk((shard, n), array, n, n * size < start or (n + 1) * size > stop)
        for start, stop in spans
        for n in range(start // size, (stop - 1) // size + 1)
    ]


def _joined(array: OpenArray, spans: Sequence[tuple[int, int]], chunks: Mapping[ChunkName, Array]) -> Array:
    """A copy only where the rows are of several chunks; else a view of the one that they are in."""
    size, pieces = array.chunk_rows, list[Array]()
    for start, stop in spans:
        for number in range(start // size, (stop - 1) // size + 1):
            chunk = chunks[array.shard, number]
            pieces.append(chunk[max(start - number * size, 0) : stop - number * size])
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces or [np.empty((0, *array.stored.row_shape), dtype=array.stored.dtype)])
