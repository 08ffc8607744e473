"""SIGTERM and Ctrl-C stop a training between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from transformers import TrainerCallback

from pipeline.distill.training.processes import is_first_process

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # see cli.EXIT_CODES
AT_ONCE = 1.0  # seconds within which a second Ctrl-C is the first: a launcher passes on what the terminal sent to all


class StopOnSignal(TrainerCallback):
    """Within its context SIGTERM or Ctrl-C ends the training after the current step, with a checkpoint.

    A second Ctrl-C raises `KeyboardInterrupt`. Several processes must stop after the same step: the Trainer sets
    `is_agreed` in all of them once `is_asked` is set in one.
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

    def ends(self, world_size: int) -> bool:
        """Whether the training ends after this step: all of its processes know of the signal."""
        return self.is_agreed or (self.is_asked and world_size == 1)

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            # A shell lets its background jobs ignore Ctrl-C; that must stay.
            ours = [number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers_before = {number: signal.signal(number, self._note) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.is_asked:
            if number == signal.SIGINT and time.monotonic() > self._asked_at + AT_ONCE:
                raise KeyboardInterrupt
            return
        if number == signal.SIGINT and is_first_process():
            # Not `print`: the signal may have come in the middle of one.
            os.write(2, b"stopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
        self.is_asked, self._signal, self._asked_at = True, signal.Signals(number), time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.ends(args.world_size):
            control.should_save = control.should_training_stop = True


def leave_signals_to_the_parent(_worker: int) -> None:
    """Make a data-loading worker ignore the signals: SLURM and terminals signal all processes, also the workers."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
