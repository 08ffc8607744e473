"""A shard opened for reading: a local tar as it is, everything else as a stream that is kept while it is read."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from webdataset.gopen import gopen  # pyright: ignore[reportMissingTypeStubs]

from cache import Span, stream_file
from pipeline.data.reading import opened, reading
from pipeline.data.remote_shards import about, sends_ranges
from pipeline.data.shard_kinds import is_local_tar, is_packed, is_pipe, is_remote
from pipeline.data.spool import Blocks, Spool
from pipeline.errors import ShardError, reason_of

GZIP = b"\x1f\x8b"
_BLOCK_BYTES = 1 << 20
_PATIENCE = 10.0  # seconds for a command to end that is not read to its end


@dataclass(frozen=True)
class ShardFacts:
    """What can be known of a shard without reading it; None or "" where nobody knows."""

    size: int | None  # of the tar
    modified_ns: int | None = None
    version: str = ""
    stored_size: int | None = None  # compressed, if the tar is

    @classmethod
    def of(cls, shard: str, *, again: bool = False) -> ShardFacts:
        """Ask the system, or the server; see `about`."""
        if is_pipe(shard):
            return cls(None)
        if is_remote(shard):
            file = about(shard, again=again)
            return cls(None if is_packed(shard) else file.size, version=file.version, stored_size=file.size)
        with reading(shard):
            status = os.stat(shard)
        size = None if is_packed(shard) else status.st_size
        return cls(size, status.st_mtime_ns, stored_size=status.st_size)


def stored_bytes(shard: str) -> int:
    """Return how many bytes a shard takes where it lies; 0 if nobody knows."""
    return ShardFacts.of(shard).stored_size or 0


@dataclass(frozen=True)
class OpenShard:
    """An open shard; `file` is its uncompressed tar."""

    shard: str
    file: BinaryIO
    facts: ShardFacts
    spool: Spool | None = None  # the same as `file`, of a stream

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes by their place in the tar; any thread may ask for what has been passed."""
        with reading(self.shard):
            if self.spool is not None:
                return self.spool.read_at(offset, size)
            return os.pread(self.file.fileno(), size, offset)

    def read_span(self, span: Span) -> bytes:
        """Return a member's bytes; raises `ShardError` if the shard is shorter."""
        return checked(self.shard, span, self.read_at(span.offset, span.size))


def checked(shard: str | Path, span: Span, data: bytes) -> bytes:
    """Return a member's bytes if they are as many as they should be; raises `ShardError` if not."""
    if len(data) != span.size:
        raise ShardError(
            f"{shard}: {span.file} should be {span.size} bytes at {span.offset}, found {len(data)}; "
            "the shard has changed since it was read: restore it."
        )
    return data


@contextmanager
def open_shard(shard: str | Path) -> Generator[OpenShard]:
    """Open a shard of any kind. A stream is read no further than asked. Raises `ShardError` where that fails."""
    shard = str(shard)
    facts = ShardFacts.of(shard)
    if is_local_tar(shard):
        with opened(shard) as file:
            yield OpenShard(shard, file, facts)
        return
    with closing(_tar_blocks(shard)) as stream, closing(Spool(stream, shard)) as spool:
        yield OpenShard(shard, cast(BinaryIO, spool), facts, spool)


def _tar_blocks(shard: str) -> Generator[bytes]:
    """Yield the bytes of a shard's tar, decompressed. Raises `ShardError` for whatever a stream ends with."""
    with reading(shard), closing(_stored_blocks(shard)) as blocks:
        stored = io.BufferedReader(Blocks(blocks), _BLOCK_BYTES)
        is_gzip = is_packed(shard) or (is_pipe(shard) and stored.peek(len(GZIP)).startswith(GZIP))
        opened: Any = gzip.GzipFile(fileobj=stored) if is_gzip else stored
        try:
            while block := opened.read1(_BLOCK_BYTES):
                yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ShardError(
                f"{shard} is damaged or truncated ({reason_of(error)}); make or copy the shard again."
            ) from error


def _stored_blocks(shard: str) -> Generator[bytes]:
    """Yield the bytes of a shard as they are stored or printed."""
    if is_remote(shard):
        file = about(shard)
        yield from stream_file(file, by_ranges=file.size is not None and sends_ranges(shard))
    elif is_pipe(shard):
        yield from _printed(shard)
    else:
        with opened(shard) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block


def _printed(command: str) -> Iterator[bytes]:
    """Yield what a command prints, by WebDataset's own opening. Raises `ShardError` if the command fails."""
    try:
        pipe: Any = gopen(command)
    except ValueError as error:  # WebDataset was told to run no commands
        raise ShardError(f"{command}: {reason_of(error)}; name the shard's file or URL instead.") from error
    try:
        while block := pipe.read(_BLOCK_BYTES):
            yield block
        pipe.close()  # waits for the command, and asks how it ended
    except OSError as error:
        raise ShardError(
            f"{command} failed with exit status {pipe.status}; what it printed is not a whole shard. Run it by hand."
        ) from error
    finally:
        pipe.timeout = _PATIENCE
        if pipe.proc.poll() is None:  # nobody wants what it would print
            pipe.proc.terminate()
        with suppress(Exception):
            pipe.close()
