"""Work beside the teacher's forward: one thread that does what it is given, in order, and says what went wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Behind:
    """Does jobs in their order in a thread of its own, of which at most `limit` are not done yet: memory is bounded.

    A job's exception is raised by the next call of `do` or `finish`; jobs after it are dropped.
    """

    def __init__(self, *, limit: int):
        self.limit = limit
        self.jobs: deque[Future[None]] = deque()
        self.thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for all jobs; after an error only for the one at work."""
        try:
            if error is None:
                self.finish()
        finally:
            self.thread.shutdown(cancel_futures=True)

    def do(self, job: Callable[[], None]) -> None:
        """Hand over a job; waits until it is one of `limit`."""
        while len(self.jobs) >= self.limit:
            self._wait_for_first()
        self.jobs.append(self.thread.submit(job))

    def finish(self) -> None:
        """Wait until all is done."""
        while self.jobs:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        try:
            self.jobs.popleft().result()
        except BaseException:
            for job in self.jobs:
                job.cancel()
            raise
