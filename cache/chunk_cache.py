"""Decompressed chunks, kept while there is room, because neighbours share them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from cache.chunks import OpenArray, read_chunks
from cache.codecs import Array
from cache.place import Place


class ChunkCache:
    """Decompressed chunks, the least recently used dropped first; one process, one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._chunks: OrderedDict[tuple[Place, int], Array] = OrderedDict()

    def rows(self, wanted: Sequence[tuple[OpenArray, Sequence[tuple[int, int]]]]) -> list[Array]:
        """Of every array the rows of its spans start..stop, in their order; what is missing is read all at once."""
        chunks = self._load([
            (array, number)
            for array, spans in wanted
            for start, stop in spans
            for number in range(start // array.chunk_rows, (stop - 1) // array.chunk_rows + 1)
        ])  # fmt: skip
        return [_joined(array, spans, chunks) for array, spans in wanted]

    def _load(self, wanted: list[tuple[OpenArray, int]]) -> dict[tuple[Place, int], Array]:
        """The chunks by shard and number; the cache may drop some of them again at once, this answer keeps them."""
        named = {(array.shard, number): (array, number) for array, number in wanted}
        chunks: dict[tuple[Place, int], Array] = {}
        for name in named.keys() & self._chunks.keys():
            self._chunks.move_to_end(name)
            chunks[name] = self._chunks[name]
        missing = [name for name in named if name not in chunks]
        for name, chunk in zip(missing, read_chunks([named[name] for name in missing]), strict=True):
            chunks[name] = self._chunks[name] = chunk
            self._held_bytes += chunk.nbytes
        while self._held_bytes > self._limit_bytes and self._chunks:
            self._held_bytes -= self._chunks.popitem(last=False)[1].nbytes
        return chunks


def _joined(
    array: OpenArray, spans: Sequence[tuple[int, int]], chunks: Mapping[tuple[Place, int], Array]
) -> Array:
    """A copy only where the rows are of several chunks; else a view of the one that they are in."""
    size, pieces = array.chunk_rows, list[Array]()
    for start, stop in spans:
        for number in range(start // size, (stop - 1) // size + 1):
            chunk = chunks[array.shard, number]
            pieces.append(chunk[max(start - number * size, 0) : stop - number * size])
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces or [np.empty((0, *array.stored.row_shape), dtype=array.stored.dtype)])
