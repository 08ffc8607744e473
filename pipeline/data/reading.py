"""The one error for a shard that the system, a server or a command refuses to give."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from cache import CacheError, UnreadableFile
from pipeline.errors import ShardError


@contextmanager
def reading(shard: str | Path) -> Generator[None]:
    """Raise `ShardError` with file and reason where it cannot be read; says nothing about the content."""
    try:
        yield
    except OSError as error:
        raise ShardError(str(UnreadableFile(Path(shard), error))) from error
    except CacheError as error:  # of a server
        raise ShardError(str(error)) from error


@contextmanager
def opened(path: str | Path) -> Generator[BinaryIO]:
    """Open a local file for reading; raises `ShardError` where the system refuses."""
    with ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(open(path, "rb"))
        yield file
