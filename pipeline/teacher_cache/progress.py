"""Progress on stderr: stage 1's by bytes of shards (hence the time left), packing's by entries."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from cache import PartSummary


class Progress:
    """A tqdm bar over the bytes of the shards to do; counters beside it."""

    def __init__(self, shards: Sequence[str], *, description: str):
        self.shards = shards
        self.samples = self.rejected = self.bytes_written = self.parts = 0
        self.started = time.monotonic()
        total = sum(Path(shard).stat().st_size for shard in shards)
        self.bar = tqdm(total=total, desc=description, unit="B", unit_scale=True, mininterval=0.5)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def begin_shard(self, shard: str, *, num_samples: int, done: int = 0) -> None:
        """A shard of so many samples, which count alike: its bytes are behind them when all are done."""
        self.shard_bytes = Path(shard).stat().st_size
        self.bytes_each = self.shard_bytes / num_samples
        self.shard_read = 0
        self.shard_done = 0
        self.advance(done)

    def advance(self, num_samples: int) -> None:
        """So many samples more are done: captured, or rejected."""
        self.samples += num_samples
        self.shard_done += num_samples
        self._read_to(int(self.shard_done * self.bytes_each))
        self._show()

    def say(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def reject(self) -> None:
        self.rejected += 1

    def captured_shard(self) -> None:
        """All of the shard is behind us, but for writing its part."""
        self._read_to(self.shard_bytes)

    def end_shard(self, summary: PartSummary) -> None:
        """A part was committed."""
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


class EntryProgress:
    """A tqdm bar over entries, there from the first call on: who has nothing to do shows none."""

    def __init__(self, *, description: str) -> None:
        self.description = description
        self.bar: tqdm | None = None

    def __enter__(self) -> EntryProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        """So many are done, of so many."""
        if self.bar is None:
            self.bar = tqdm(desc=self.description, total=total, unit="entry", mininterval=0.5)
        self.bar.update(done - self.bar.n)
