"""The next shard, fetched from its server while the teacher works on this one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager

from pipeline.data.shard_files import OpenShard, open_shard
from pipeline.data.shard_kinds import is_local_tar
from pipeline.errors import PipelineError, ShardError

_STEP_BYTES = 1 << 24  # fetched between two looks at whether it is still wanted


class Ahead(AbstractContextManager["Ahead"]):
    """Fetches at most one shard, in its own thread, into the temporary file that it is then read from."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._shard = ""
        self._fetching: Future[OpenShard] | None = None
        self._open = ExitStack()
        self._unwanted = threading.Event()

    def __exit__(self, *_: object) -> None:
        self._drop()
        if self._thread is not None:
            self._thread.shutdown()

    def fetch(self, shard: str | None) -> None:
        """Begin to fetch a shard, unless it is a local tar. One that was fetched in vain is dropped."""
        self._drop()
        if shard is not None and not is_local_tar(shard):
            self._thread = self._thread or ThreadPoolExecutor(1)
            self._shard, self._unwanted = shard, threading.Event()
            self._fetching = self._thread.submit(self._fetch, shard, self._unwanted)

    def _fetch(self, shard: str, unwanted: threading.Event) -> OpenShard:
        opened = self._open.enter_context(open_shard(shard))
        held = -1
        while opened.spool is not None and not unwanted.is_set() and opened.spool.fetch(0) > held:
            held = opened.spool.fetch(0)
            opened.spool.fetch(held + _STEP_BYTES)
        return opened

    @contextmanager
    def open(self, shard: str) -> Generator[OpenShard]:
        """Open a shard: the one that was fetched, else as `open_shard` does."""
        with ExitStack() as stack:
            yield self._take(stack) if shard == self._shard else stack.enter_context(open_shard(shard))

    def _take(self, stack: ExitStack) -> OpenShard:
        assert self._fetching is not None  # there is one while `_shard` names it
        fetching, shard, self._shard = self._fetching, self._shard, ""
        try:
            opened = fetching.result()
        except ShardError:
            raise
        except PipelineError:  # the disk had no room for two shards; for one it may
            self._drop()
            return stack.enter_context(open_shard(shard))
        finally:
            stack.enter_context(self._open.pop_all())
        return opened

    def _drop(self) -> None:
        self._unwanted.set()
        self._shard = ""
        if self._fetching is not None:
            self._fetching.exception()  # waits; whoever wants the shard later meets the error again
            self._fetching = None
        self._open.close()
