"""The samples that each process trains on, batch by batch: one order for an epoch, cut into slices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

WINDOW = 1024  # samples among which blocks are mixed


Draw = tuple[int, bool]  # index of a sample, and whether it is a filler: see `RankBatches`


@dataclass
class RankBatches:
    """A batch sampler for one process: its slice of each `batch_size * num_processes` samples of the epoch.

    The order depends on seed and epoch alone, so steps of equally many samples are the same steps for any number of
    processes. No sample comes twice in an epoch: where its end leaves a process without samples, that process gets
    one filler, a sample that keeps it in step and counts for nothing. With `drop_last` an epoch ends with its last
    whole step, of `accumulation` batches.
    """

    num_samples: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    seed: int = 0
    drop_last: bool = False
    accumulation: int = 1
    block: int = 1  # neighbours of the store that stay near each other, see `shuffled`
    epoch: int = 0
    is_shuffled: bool = True  # else in the data set's own order

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        together = self.batch_size * self.num_processes
        if self.drop_last:
            return self.num_samples // (together * self.accumulation) * self.accumulation
        return math.ceil(self.num_samples / together)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.arange(self.num_samples)
        if self.is_shuffled:
            order = shuffled(self.num_samples, generator, block=self.block)
        together = self.batch_size * self.num_processes
        for start in range(0, len(self) * together, together):
            mine = start + self.process_index * self.batch_size
            batch = order[mine : mine + self.batch_size].tolist()
            yield [(index, False) for index in batch] or [(int(order[start]), True)]


def shuffled(
    num_samples: int, generator: torch.Generator, *, block: int, window: int = WINDOW
) -> torch.Tensor:
    """Return an order of all samples: each by itself, or blocks of neighbours, drawn and then mixed within a window.

    Neighbours share chunks of the store, so a block is read at once. A `window` of so many samples, far more than a
    batch, keeps neighbours from filling a batch.
    """
    if block == 1:
        return torch.randperm(num_samples, generator=generator)
    starts = block * torch.randperm(math.ceil(num_samples / block), generator=generator)
    order: list[torch.Tensor] = []
    for some in starts.split(math.ceil(window / block)):
        samples = torch.cat([torch.arange(start, min(start + block, num_samples)) for start in some.tolist()])
        order.append(samples[torch.randperm(len(samples), generator=generator)])
    return torch.cat(order)
