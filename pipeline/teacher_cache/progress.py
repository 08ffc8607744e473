"""The progress bar of stage 1 on stderr: it counts bytes of shards, which gives the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from tqdm import tqdm

from cache import PartSummary
from pipeline.data.shard_files import stored_bytes
from pipeline.progress import LINE_SECONDS, can_redraw


class Progress(AbstractContextManager["Progress"]):
    """A tqdm bar over the bytes of the shards, with counters of samples, rejects, bytes and parts."""

    def __init__(self, shards: Sequence[str], *, description: str):
        self.shards = shards
        self.samples = self.rejected = self.bytes_written = self.parts = 0
        self.started = time.monotonic()
        total = sum(map(stored_bytes, shards)) or None
        often = 0.5 if can_redraw(sys.stderr) else LINE_SECONDS
        self.bar = tqdm(total=total, desc=description, unit="B", unit_scale=True, mininterval=often)

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin_shard(self, shard: str, *, num_samples: int, done: int = 0) -> None:
        """Begin a shard, of which each sample counts for the same share of the bytes."""
        self.shard_bytes = stored_bytes(shard)
        self.shard_samples = num_samples
        self.shard_read = self.shard_done = 0
        self.advance(done)

    def advance(self, num_samples: int) -> None:
        """Count samples that were captured or rejected."""
        self.samples += num_samples
        self.shard_done += num_samples
        self._read_to(self.shard_bytes * self.shard_done // self.shard_samples)
        self._show()

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
        self.bar.update(max(0, position - self.shard_read))
        self.shard_read = max(self.shard_read, position)

    def _show(self) -> None:
        rate = self.samples / max(time.monotonic() - self.started, 1e-9)
        written = tqdm.format_sizeof(self.bytes_written, "B")
        self.bar.set_postfix_str(
            f"{rate:.0f} samples/s, {self.rejected} rejected, {written} written, "
            f"part {self.parts}/{len(self.shards)}",
            refresh=False,
        )
