"""The progress of a training on stderr: a redrawn line on a terminal, elsewhere a line for each log entry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from pipeline.progress import can_redraw
from pipeline.readable import readable_seconds

REDRAW_SECONDS = 0.25
BAR_COLUMNS = 12


class TrainingLine(TrainerCallback, AbstractContextManager["TrainingLine"]):
    """Shows step, loss, each raw term, learning rate, samples/s and the time left; the first process alone does.

    It stands in for transformers' own bar and printed dicts. As a context it ends the redrawn line, also after an
    error. The full record is in `trainer_state.json` and, if asked for, in TensorBoard.
    """

    def __init__(self, trainer: Trainer, *, clock: Callable[[], float] = time.monotonic):
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        self.trainer, self.clock = trainer, clock
        self.drawing = ExitStack()
        self.live: Live | None = None
        self.drawn = 0.0  # when
        self.logged: Mapping[str, Any] = {}
        self.speed = Speed(clock)

    def __exit__(self, *_: object) -> None:
        self.drawing.close()
        self.live = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.__exit__()  # it may begin once more, with smaller batches
        self.logged, self.speed = {}, Speed(self.clock)
        if not state.is_world_process_zero:
            return
        for folder in _tensorboard_folders(self.trainer):
            _print(f"TensorBoard's files are in {folder}; to see them: tensorboard --logdir {folder}")
        if can_redraw(sys.stderr) and not args.disable_tqdm:
            # Redrawn after steps, by no thread: data workers are forks, and a lock that it holds would stay locked.
            self.live = Live(console=Console(file=sys.stderr), auto_refresh=False)
            self.drawing.enter_context(self.live)

    def on_step_end(self, args, state, control, **kwargs):
        self.speed.step(state.global_step)
        if self.live and self.clock() - self.drawn >= REDRAW_SECONDS:
            self._draw(self.live)

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if "loss" not in logs:
            if held_out := [*_held_out(logs)]:
                _print(f"{_step(state)}, held out: {', '.join(held_out)}")
            return
        self.logged = dict(logs)
        if self.live is None:
            _print(self.text())

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.live:
            self._draw(self.live)
        self.__exit__()
        if seconds := self.speed.seconds:
            _print(f"trained to {_step(state)} in {readable_seconds(seconds)}")
        if args.load_best_model_at_end and (best := state.best_model_checkpoint):
            _print(
                f"the weights are those of {best}, with the best {args.metric_for_best_model} of all checkpoints"
            )

    def _draw(self, live: Live) -> None:
        state = self.trainer.state
        live.update(_bar_beside(self.text(), done=state.global_step, total=state.max_steps), refresh=True)
        self.drawn = self.clock()

    def text(self) -> str:
        """Return the line: what the log said last, and the speed of all steps but the first."""
        state, said = self.trainer.state, [*_losses(self.logged)]
        if rate := self.speed.steps_per_second:
            samples = rate * self.trainer.get_total_train_batch_size(self.trainer.args)
            said.append(f"{samples:,.3g} samples/s" if samples < 1000 else f"{samples:,.0f} samples/s")
            if left := state.max_steps - state.global_step:
                said.append(f"{readable_seconds(left / rate, digits=2)} left")
        return ", ".join([_step(state), *said])


class Speed:
    """The speed of a run's steps. The first is left out of it, since it also loads, allocates and compiles."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.began = clock()
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def step(self, number: int) -> None:
        """Note that a step has ended."""
        self.last = (number, self.clock())
        self.first = self.first or self.last

    @property
    def seconds(self) -> float:
        """The time from the beginning to the end of the last step; 0 without a step."""
        return self.last[1] - self.began if self.last else 0.0

    @property
    def steps_per_second(self) -> float | None:
        """None before the second step."""
        if self.first is None or self.last is None or self.last[1] <= self.first[1]:
            return None
        return (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])


def _losses(logged: Mapping[str, Any]) -> Iterator[str]:
    """Yield the loss, each term as it is before its weight, and the learning rate."""
    for name, value in logged.items():
        if name == "loss" or (name.startswith("loss/") and f"{name}_weighted" in logged):
            yield f"{name.removeprefix('loss/')} {_shown(value)}"
    if "learning_rate" in logged:
        yield f"learning rate {_shown(logged['learning_rate'])}"


def _held_out(logged: Mapping[str, Any]) -> Iterator[str]:
    """Yield the losses of held-out samples, and how long they took."""
    for name, value in logged.items():
        if name.startswith("eval_") and not name.endswith(("_per_second", "_runtime", "_time")):
            yield f"{name.removeprefix('eval_')} {_shown(value)}"
    if "eval_runtime" in logged:
        yield f"in {readable_seconds(logged['eval_runtime'], digits=2)}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _step(state: Any) -> str:
    return f"step {state.global_step:,} of {state.max_steps:,}"


def _tensorboard_folders(trainer: Trainer) -> Iterator[str]:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir:
            yield callback.logging_dir


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _bar_beside(text: str, *, done: float, total: float) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_column(no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(ProgressBar(total=total, completed=done, width=BAR_COLUMNS), Text(text))
    return row
