"""Stopping between two steps on SIGTERM or Ctrl-C, and what a checkpoint keeps so that a resumed log is whole."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

from pipeline.distill.training.processes import is_first_process

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # see cli.EXIT_CODES
AT_ONCE = 1.0  # seconds within which Ctrl-C is one: a launcher passes on what the terminal sent to all


class StopOnSignal(TrainerCallback):
    """Within its context SIGTERM or Ctrl-C ends the training after the step at work, with a checkpoint.

    A second Ctrl-C ends it at once, as an interrupt. `is_agreed` is for several processes: all must stop after the
    same step, so they tell each other.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_agreed = False
        self._signal = signal.SIGTERM
        self._asked_at = 0.0
        self._handlers_before: dict[int, Any] = {}

    def __str__(self) -> str:
        return "Ctrl-C" if self._signal == signal.SIGINT else "SIGTERM"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self._signal]

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            # A job in the background of a script ignores Ctrl-C, and is to go on doing so.
            ours = [number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers_before = {number: signal.signal(number, self._note) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            if self.is_asked and time.monotonic() > self._asked_at + AT_ONCE:
                raise KeyboardInterrupt
            if not self.is_asked and is_first_process():
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"stopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
        if not self.is_asked:
            self.is_asked, self._signal, self._asked_at = True, signal.Signals(number), time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_agreed or (self.is_asked and args.world_size == 1):
            control.should_save = control.should_training_stop = True


def leave_signals_to_the_parent(_worker: int) -> None:
    """In a data-loading worker: SLURM and terminals signal all processes, and one that dies takes the step along."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
