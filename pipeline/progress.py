"""Stage 1's progress on stderr: bytes of shards read (hence the time left), samples a second, bytes written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from cache import PartSummary
from pipeline.shards import Rejected, Sample


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

    def begin_shard(self, shard: str) -> None:
        self.shard_bytes = Path(shard).stat().st_size
        self.shard_read = 0

    def advance(self, item: Sample | Rejected) -> None:
        """One more sample was read."""
        self.samples += 1
        if isinstance(item, Sample):
            end = max(span.offset + span.size for span in (item.json_span, *item.image_spans))
            self._read_to(end)
        self._show()

    def reject(self) -> None:
        self.rejected += 1

    def end_shard(self, summary: PartSummary) -> None:
        """A part was committed."""
        self._read_to(self.shard_bytes)
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
