"""The order of an epoch: a permutation whatever the blocks, the same for any processes, near to the store's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distill.join.rank_batches import RankBatches, shuffled


def order(num_samples: int, *, block: int, window: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return shuffled(num_samples, generator, block=block, window=window).tolist()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 200), st.integers(0, 3))
def test_every_sample_is_met_once_in_an_order_of_the_seed(num_samples, block, window, seed):
    first, second = (order(num_samples, block=block, window=window, seed=seed) for _ in range(2))
    assert first == second and sorted(first) == list(range(num_samples))


def test_blocks_stay_within_their_window_and_windows_are_of_blocks_from_everywhere():
    found = order(1600, block=16, window=64)
    windows = [found[start : start + 64] for start in range(0, 1600, 64)]
    assert all(len({sample // 16 for sample in window}) == 4 for window in windows)
    neighbours = sum(b - a == 1 for window in windows for a, b in itertools.pairwise(window))
    assert (
        neighbours < 100
    )  # within a window samples are mixed: of 1,600 pairs a few are neighbours by chance
    assert len({window[0] // 400 for window in windows}) == 4
    assert found != order(1600, block=16, window=64, seed=1)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize(("batch_size", "num_processes"), [(12, 1), (6, 2), (4, 3)])
def test_processes_cut_the_same_global_batches(block, batch_size, num_processes):
    alone = list(RankBatches(50, 12, block=block))
    ranks = [
        list(RankBatches(50, batch_size, num_processes, rank, block=block)) for rank in range(num_processes)
    ]
    for whole, *pieces in zip(alone, *ranks, strict=True):
        together = [sample for piece in pieces for sample in piece if not sample[1]]
        assert together == whole
