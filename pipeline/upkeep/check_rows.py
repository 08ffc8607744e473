"""The arrays of several samples together, as `check_store` compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.distill.join.sample import JoinedSample

Arrays = Mapping[str, np.ndarray]


class AllRows(Mapping[str, np.ndarray]):
    """Array -> its values of all samples, concatenated when asked for: all arrays at once would double the memory.

    Of arrays with a block for each image it is one flat vector, since the blocks differ in their columns; codecs
    that scale rows are compared block by block (`blocks`).
    """

    def __init__(self, samples: Sequence[JoinedSample]):
        self.samples = samples

    def blocks(self, name: str) -> list[np.ndarray]:
        """Return the array of each sample, or of each image of each sample."""
        arrays = (sample.arrays[name] for sample in self.samples)
        return [part for array in arrays for part in (array if isinstance(array, list) else [array])]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.samples[0].arrays:
            raise KeyError(name)
        blocks = self.blocks(name)
        if isinstance(self.samples[0].arrays[name], list):
            return np.concatenate([np.empty(0, np.float32), *(block.ravel() for block in blocks)])
        return np.concatenate(blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples[0].arrays)

    def __len__(self) -> int:
        return len(self.samples[0].arrays)
