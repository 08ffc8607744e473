"""Which samples a process trains on, batch by batch: the seed's order of an epoch, cut the same by any processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

WINDOW = 1024  # samples among which blocks are mixed


class Filler(int):
    """Index of a sample that is read only to keep a process in step with the others: it counts for nothing."""


@dataclass
class RankBatches:
    """A batch sampler: every process takes its slice of each `batch_size * num_processes` samples of the epoch.

    Order and position depend on seed and epoch alone, so that they are the same for any number of processes with
    the same product, and going on from a step reads nothing of what was before. No sample is met twice in an epoch:
    where its end leaves a process without samples, that process gets one `Filler`. In epoch `first_epoch` the samples
    before `first_sample` are left out of their batches, and of no later one.
    """

    num_samples: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    seed: int = 0
    drop_last: bool = False
    block: int = 1  # neighbours of the store that stay near each other, see `shuffled`
    epoch: int = 0
    first_epoch: int = 0
    first_sample: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def samples_an_epoch(self) -> int:
        """All, unless the last batch is dropped."""
        return min(self.num_samples, len(self) * self.batch_size * self.num_processes)

    def __len__(self) -> int:
        batches = self.num_samples / (self.batch_size * self.num_processes)
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = shuffled(self.num_samples, generator, block=self.block)
        together = self.batch_size * self.num_processes
        first = self.first_sample if self.epoch == self.first_epoch else 0
        for start in range(0, len(self) * together, together):
            mine = start + self.process_index * self.batch_size
            batch = order[max(mine, first) : mine + self.batch_size].tolist()
            yield batch or [Filler(order[max(start, first)])]


def shuffled(num_samples: int, generator: torch.Generator, *, block: int) -> torch.Tensor:
    """An order of all samples: each by itself, or blocks of neighbours drawn at random and mixed within a window.

    Neighbours share chunks of the store, so a block is read at once; a window of `WINDOW` samples or more, far more
    than a batch, keeps a batch from being made of neighbours.
    """
    if block == 1:
        return torch.randperm(num_samples, generator=generator)
    starts = block * torch.randperm(math.ceil(num_samples / block), generator=generator)
    order: list[torch.Tensor] = []
    for some in starts.split(math.ceil(WINDOW / block)):
        window = torch.cat([torch.arange(start, min(start + block, num_samples)) for start in some.tolist()])
        order.append(window[torch.randperm(len(window), generator=generator)])
    return torch.cat(order)
