"""A line about long work every 30 seconds where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import sys
import time
from threading import Condition, Event

import pytest

from pipeline.progress import LINE_SECONDS, Progress, can_redraw


class Clock(Event):
    """A clock that stands until it is moved; those who wait for its time wait for that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.moved = Condition()

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        until = self.now + timeout
        with self.moved:
            self.moved.wait_for(lambda: self.now >= until or self.is_set())
        return self.is_set()

    def set(self) -> None:
        with self.moved:
            super().set()
            self.moved.notify_all()

    def move(self, seconds: float) -> None:
        time.sleep(0.05)  # whoever waits has begun to
        with self.moved:
            self.now += seconds
            self.moved.notify_all()
        time.sleep(0.05)  # and has printed


@pytest.fixture
def clock() -> Clock:
    return Clock()


def packing(clock: Clock, unit: str = "entries") -> Progress:
    return Progress("pack", unit=unit, doing="reading a.json", clock=clock, ended=clock)


def test_a_line_comes_every_30_seconds_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]):
    assert LINE_SECONDS == 30
    with packing(clock) as progress:
        progress(0, 1_000_000)
        clock.move(29.5)
        assert capsys.readouterr().err == ""
        progress(147_000, 1_000_000)
        clock.move(0.5)
        assert (
            capsys.readouterr().err
            == "pack: 147,000 of 1,000,000 entries, 4,900 a second, 2.9 minutes left\n"
        )
        progress(294_000, 1_000_000)
        clock.move(30)
        progress(1_000_000, 1_000_000)
        clock.move(5)
    assert capsys.readouterr().err.splitlines() == [
        "pack: 294,000 of 1,000,000 entries, 4,900 a second, 2.4 minutes left",
        "pack: 1,000,000 of 1,000,000 entries, 15,000 a second",
    ]


def test_short_work_prints_nothing_also_when_it_fails(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with packing(clock) as progress:
        clock.move(29)
        progress(3, 3)
    with pytest.raises(ValueError, match="broken"), packing(Clock()) as progress:
        raise ValueError("broken")
    assert capsys.readouterr().err == ""


def test_work_that_reports_nothing_says_what_it_does(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with packing(clock) as progress:
        clock.move(30)
        progress.step("sorting")
        clock.move(30)
    assert capsys.readouterr().err.splitlines() == [
        "pack: reading a.json, 30 seconds so far",
        "pack: sorting, 30 seconds so far",
    ]


def test_another_count_starts_another_rate(clock: Clock):
    progress = packing(clock)
    progress(0, None)
    clock.now += 10
    progress(1000, None)
    assert progress.text() == "1,000 entries, 100 a second"
    progress(10, 1000)
    assert progress.text() == "10 of 1,000 entries"
    clock.now += 10
    progress(20, 1000)
    assert progress.text() == "20 of 1,000 entries, 1 a second, 16 minutes left"


def test_bytes_are_told_as_bytes(clock: Clock):
    progress = packing(clock, unit="bytes")
    progress(0, 8_000_000_000)
    clock.now += 10
    progress(1_234_000_000, 8_000_000_000)
    assert progress.text() == "1.23 GB of 8 GB, 120 MB a second, 55 seconds left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with packing(clock) as progress:
        progress(1, 2)
    assert "#" in terminal.getvalue() and "1 of 2 entries" in terminal.getvalue()
    assert sys.stderr is terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(terminal)
