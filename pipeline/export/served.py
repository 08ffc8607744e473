"""An object in a process of its own: what ends that process, even an assertion in C, is one sentence here."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from pipeline.errors import PipelineError, reason_of

LAST_CHARACTERS = 400
PEAK = "peak of memory"
# Linux' own: what a process had at most, and how to make it forget that.
STATUS, CLEAR, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"


class Served(AbstractContextManager[Any]):
    """Calls the methods of `build(*arguments)`, which is made in another process.

    `what` names it in messages. Raises `PipelineError` if it raises, or if the process ends.
    """

    def __init__(self, build: Callable[..., Any], *arguments: Any, what: str) -> None:
        self.what = what
        self.words = tempfile.NamedTemporaryFile(prefix="alignkd-", suffix=".log")  # noqa: SIM115
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve, args=(theirs, self.words.name, build, arguments), daemon=True
        )
        self.process.start()
        theirs.close()
        self._received()

    def __enter__(self) -> Self:
        return self

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Return what a method of the object returns."""
        self.connection.send((method, arguments, named))
        return self._received()

    def model_bytes(self) -> int:
        """Return the largest memory of the process so far, less what it had before the object was built."""
        return self.call(PEAK)

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
        self.words.close()

    def _received(self) -> Any:
        try:
            fails, result = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            words = " ".join(Path(self.words.name).read_text(errors="replace").split())[-LAST_CHARACTERS:]
            raise PipelineError(
                f"{self.what} ended with code {self.process.exitcode}; its last words: {words or 'none'}"
            ) from error
        if fails:
            raise PipelineError(result)
        return result


def _serve(connection: Connection, words: str, build: Callable[..., Any], arguments: Any) -> None:
    """Build the object and call it until the other end closes."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    os.dup2(os.open(words, os.O_WRONLY), 2)
    before = _start_peak()
    try:
        served = build(*arguments)
        connection.send((False, None))
        while True:
            method, positional, named = connection.recv()
            if method == PEAK:
                connection.send((False, _peak_bytes() - before))
            else:
                connection.send((False, getattr(served, method)(*positional, **named)))
    except EOFError:
        return
    except Exception as error:
        connection.send((True, reason_of(error)))


def _start_peak() -> int:
    """Let the peak begin at what the process has now, and return that in bytes."""
    with suppress(OSError):
        CLEAR.write_text(FORGET_PEAK)
    return _peak_bytes()


def _peak_bytes() -> int:
    """Return the process's largest resident memory; `getrusage` also counts that of its parent."""
    with suppress(OSError):
        [kilobytes] = re.findall(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
