"""Progress of long work, on stderr: a bar on a terminal; elsewhere a line every 30 seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from threading import Event, Thread
from typing import IO

from tqdm import tqdm

from pipeline.readable import readable_bytes, readable_seconds

LINE_SECONDS = 30.0
REDRAW_SECONDS = 0.5
# The counts are ours: they also say what is waited for.
BAR = "{bar:12} {desc}"


def can_redraw(stream: IO[str]) -> bool:
    """Whether what was printed can be printed over: a terminal, and not a dumb one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress(AbstractContextManager["Progress"]):
    """The progress of one piece of work: call it with what is done, and of how much.

    Without a terminal, work that ends within the first 30 seconds prints nothing. A thread prints the lines, so that
    they also come while nothing is reported.
    """

    def __init__(
        self,
        name: str,
        *,
        unit: str,
        doing: str,
        clock: Callable[[], float] = time.monotonic,
        ended: Event | None = None,
    ) -> None:
        self.name, self.unit, self.clock = name, unit, clock
        self.stack, self.ended = ExitStack(), ended or Event()
        self.printed = self.note = ""  # `note`: what else to say beside the counts
        self.step(doing)

    def __enter__(self) -> Progress:
        self.stream = sys.stderr
        if can_redraw(self.stream):
            bar = tqdm(file=self.stream, bar_format=BAR, dynamic_ncols=True)
            self.stack.callback(bar.close)
            self.stack.callback(self._draw, bar)
            shows = partial(self._repeat, REDRAW_SECONDS, partial(self._draw, bar))
        else:
            shows = partial(self._repeat, LINE_SECONDS, self._print)
        thread = Thread(target=shows, daemon=True)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(self.ended.set)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        if self.printed:
            self._print()

    def step(self, doing: str) -> None:
        """Say what is done now; it is shown until something is counted."""
        self.doing = doing
        self.began = self.clock()
        self.done: int | None = None
        self.total: int | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Report that `done` of `total` are done; None if nobody knows how many there are."""
        if self.done is None or done < self.done or total != self.total:
            self.began, self.done_before = self.clock(), done  # the rate is that of what follows
        self.done, self.total = done, total

    def text(self) -> str:
        """Return what is done, how fast, and how long the rest will take."""
        seconds = self.clock() - self.began
        if self.done is None:
            return f"{self.doing}, {readable_seconds(seconds, digits=2)} so far"
        said = [self._amount(self.done) if self.total is None else self._share(self.done, self.total)]
        if seconds > 0 and (rate := (self.done - self.done_before) / seconds) > 0:
            said.append(f"{self._number(float(f'{rate:.2g}'))} a second")
            if self.total is not None and self.done < self.total:
                said.append(f"{readable_seconds((self.total - self.done) / rate, digits=2)} left")
        return ", ".join([*said, *filter(None, [self.note])])

    def _share(self, done: int, total: int) -> str:
        return f"{self._number(done)} of {self._amount(total)}"

    def _amount(self, count: int) -> str:
        return self._number(count) if self.unit == "bytes" else f"{count:,} {self.unit}"

    def _number(self, count: float) -> str:
        return readable_bytes(count) if self.unit == "bytes" else f"{count:,.10g}"

    def _draw(self, bar: tqdm) -> None:
        bar.n, bar.total = self.done or 0, self.total
        bar.set_description_str(f"{self.name}: {self.text()}")

    def _repeat(self, seconds: float, show: Callable[[], None]) -> None:
        while not self.ended.wait(seconds):
            show()

    def _print(self) -> None:
        line = f"{self.name}: {self.text()}"
        if line != self.printed:
            print(line, file=self.stream, flush=True)
        self.printed = line
