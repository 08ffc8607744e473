"""The progress of stage 1 on stderr: it counts bytes of shards, which gives the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from tqdm import tqdm

from cache import PartSummary
from pipeline.data.shard_files import stored_bytes
from pipeline.progress import Progress as Line
from pipeline.readable import readable_bytes


class Progress(AbstractContextManager["Progress"]):
    """The bytes of the shards that were read, with counters of samples, rejects, bytes and parts."""

    def __init__(
        self, shards: Sequence[str], *, description: str, count: Callable[[int], object] = lambda done: None
    ):
        """`count` gets how many samples were captured or rejected."""
        self.shards, self.count = shards, count
        self.samples = self.rejected = self.bytes_written = self.parts = self.read = 0
        self.started = time.monotonic()
        self.total = sum(map(stored_bytes, shards)) or None
        self.line = Line(description, unit="bytes", doing="reading the first shard")

    def __enter__(self) -> Progress:
        self.line.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.line.__exit__()

    def begin_shard(self, shard: str, *, num_samples: int, done: int = 0) -> None:
        """Begin a shard, of which each sample counts for the same share of the bytes."""
        self.shard_bytes = stored_bytes(shard)
        self.shard_samples = num_samples
        self.shard_read = self.shard_done = 0
        self.advance(done)

    def advance(self, num_samples: int) -> None:
        """Count samples that were captured or rejected."""
        self.samples += num_samples
        self.count(self.samples)
        self.shard_done += num_samples
        self._read_to(self.shard_bytes * self.shard_done // self.shard_samples)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def reject(self) -> None:
        self.rejected += 1

    def captured_shard(self) -> None:
        """Show the shard as read to its end; its part is not written yet."""
        self._read_to(self.shard_bytes)

    def end_shard(self, summary: PartSummary) -> None:
        """Count a committed part."""
        self.parts += 1
        self.bytes_written += sum(summary.array_bytes.values())
        self._show()

    def _read_to(self, position: int) -> None:
        self.read += max(0, position - self.shard_read)
        self.shard_read = max(self.shard_read, position)
        self._show()

    def _show(self) -> None:
        rate = self.samples / max(time.monotonic() - self.started, 1e-9)
        self.line.note = (
            f"{rate:.2g} samples/s, {self.rejected} rejected, {readable_bytes(self.bytes_written)} written, "
            f"part {self.parts} of {len(self.shards)}"
        )
        self.line(self.read, self.total)
