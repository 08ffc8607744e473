"""A stream as a file: what has come of it lies in a temporary file, where it can be read again."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from pipeline.errors import writing


class Blocks(io.RawIOBase):
    """Blocks of bytes as a file that is read front to back."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, at most to the end of a block; 0 at the end of the stream."""
        while not self._left and (block := next(self._blocks, None)) is not None:
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


class Spool(io.RawIOBase):
    """Reads a stream no further than asked, and any part of that again.

    The temporary file has no name: nothing is left of it, however the process ends. It lies where Python puts
    temporary files (`TMPDIR`), and grows as large as the tar.
    """

    def __init__(self, stream: Iterator[bytes], name: str) -> None:
        self._stream, self.name = stream, name
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._held = self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place. Its bytes are fetched when they are read, unless the place is the end."""
        origins = {os.SEEK_SET: lambda: 0, os.SEEK_CUR: self.tell, os.SEEK_END: self.fetch}
        self._position = offset + origins[whence]()
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; all that follow if no number is given."""
        data = self.read_at(self._position, size if size >= 0 else self.fetch() - self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; 0 at the end."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes from any place. What has come already may be read by several threads."""
        self.fetch(offset + size)
        return os.pread(self._file.fileno(), size, offset)

    def fetch(self, stop: int | None = None) -> int:
        """Fetch the stream up to `stop`, or to its end. Return how many bytes are held."""
        while stop is None or self._held < stop:
            if (block := next(self._stream, None)) is None:
                break
            where = f"the temporary folder {tempfile.gettempdir()}, which holds a shard while it is read"
            with writing(where, then="make room there, or set TMPDIR to another folder"):
                self._file.write(block)
                self._file.flush()
            self._held += len(block)
        return self._held

    def close(self) -> None:
        self._file.close()
        super().close()
