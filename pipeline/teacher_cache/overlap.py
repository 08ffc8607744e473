"""A thread that works during the teacher's forward."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager


class Behind(AbstractContextManager["Behind"]):
    """Runs jobs one after the other in its own thread. At most `limit` jobs are unfinished, to bound memory.

    The exception of a job is raised by the next call of `do` or `finish`. Later jobs are cancelled.
    """

    def __init__(self, *, limit: int):
        self.limit = limit
        self.jobs: deque[Future[None]] = deque()
        self.thread = ThreadPoolExecutor(max_workers=1)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Wait for all jobs; after an error only for the running one."""
        try:
            if error is None:
                self.finish()
        finally:
            self.thread.shutdown(cancel_futures=True)

    def do(self, job: Callable[[], None]) -> None:
        """Add a job; wait while `limit` jobs are unfinished."""
        while len(self.jobs) >= self.limit:
            self._wait_for_first()
        self.jobs.append(self.thread.submit(job))

    def finish(self) -> None:
        """Wait for all jobs."""
        while self.jobs:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        try:
            self.jobs.popleft().result()
        except BaseException:
            for job in self.jobs:
                job.cancel()
            raise
