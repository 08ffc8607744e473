"""Which worker writes which shard: each begins with its own share, then takes shards that are left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cache import StoreWriter
from pipeline.data.shard_kinds import part_name
from pipeline.errors import ConfigError

POLL_SECONDS = 5.0  # between two checks of shards that other workers hold


@dataclass(frozen=True)
class Worker:
    """One of `world_size` processes, on one machine or several, that write one store."""

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank {self.rank} of {self.world_size}: expected a rank from 0 to world size - 1; correct --rank "
                "and --world-size, or RANK and WORLD_SIZE"
            )

    def in_order(self, shards: Sequence[str]) -> list[str]:
        """Return its own share first (every `world_size`-th shard), then the shares of the next workers."""
        shares = [
            shards[(self.rank + step) % self.world_size :: self.world_size] for step in range(self.world_size)
        ]
        return [shard for share in shares for shard in share]


ALONE = Worker(0, 1)


def worker_of(rank: int | None, world_size: int | None) -> Worker:
    """Return the worker of the command line's options, else of torchrun's RANK and WORLD_SIZE, else the only one."""
    if (rank is None) != (world_size is None):
        raise ConfigError("--rank and --world-size go together: give both, or neither")
    if rank is None or world_size is None:
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    return Worker(rank, world_size)


def shards_to_write(
    store: StoreWriter,
    shards: Sequence[str],
    worker: Worker,
    *,
    needs_capture: Callable[[str], bool],
    say: Callable[[str], None],
) -> Iterator[tuple[str, ExitStack]]:
    """Yield shards to capture, each with this worker's lease, to be closed when its part is written.

    A shard is yielded once. While other workers hold the last shards this waits, to take over those of a worker that
    dies.
    """
    left, waiting = worker.in_order(shards), False
    while left := [shard for shard in left if needs_capture(shard)]:
        taken: list[str] = []
        for shard in left:
            with ExitStack() as lease:
                is_ours = lease.enter_context(store.claim(part_name(shard)))
                # Before the claim another worker may have finished it.
                if is_ours and needs_capture(shard):
                    taken.append(shard)
                    yield shard, lease.pop_all()
        left = [shard for shard in left if shard not in taken]
        if left and not taken:
            if not waiting:
                say(f"waiting for {len(left)} shards that other workers are capturing, such as {left[0]}")
            waiting = True
            time.sleep(POLL_SECONDS)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ConfigError(
            f"{name}={text!r} in the environment: expected a number; unset or correct it"
        ) from error
