"""Stopping between two steps on SIGTERM, and what a checkpoint keeps so that going on logs what would have been."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Within its context SIGTERM ends the training after the step at work, with a checkpoint.

    `is_agreed` is for several processes: all must stop after the same step, so they tell each other.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_agreed = False
        self._handler_before: Any = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)

    def _note(self, *_: object) -> None:
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_agreed or (self.is_asked and args.world_size == 1):
            control.should_save = control.should_training_stop = True


def leave_sigterm_to_the_parent(_worker: int) -> None:
    """In a data-loading worker: SLURM signals every process of a job, and a worker that dies takes the step along."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class TakeUpLog(TrainerCallback):
    """Calls the trainer's `take_up_log` once its own sums are set to zero."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_up_log()
