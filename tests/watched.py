"""Watch a run, and disturb it, through the hooks that torch and transformers give to everybody."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cache import Store
from pipeline.config.config import Config
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.student import train_student
from pipeline.errors import TrainingStopped

Tokens = tuple[int, ...]


@contextmanager
def before_forward(kind: type[nn.Module], act: Callable[..., Any]) -> Iterator[None]:
    """Call `act(module, *arguments)` before every forward of a module of this class."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, kind):
            act(module, *arguments)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def interrupt_in_batch(number: int) -> Iterator[None]:
    """Raise KeyboardInterrupt in the language model's forward of this batch, counted from 1."""
    batches = itertools.count(1)

    def interrupt(layer: LlamaDecoderLayer, *_: Any) -> None:
        if layer.self_attn.layer_idx == 0 and next(batches) == number:
            raise KeyboardInterrupt

    with before_forward(LlamaDecoderLayer, interrupt):
        yield


@contextmanager
def results_of(kind: type[nn.Module]) -> Iterator[list[Any]]:
    """The results of every forward of a module of this class, in a list that grows."""
    results: list[Any] = []
    handle = register_module_forward_hook(
        lambda module, _, result: results.append(result) if isinstance(module, kind) else None
    )
    try:
        yield results
    finally:
        handle.remove()


@contextmanager
def steps_of_training() -> Iterator[list[list[Tokens]]]:
    """The token ids of every sample of every optimizer step, in a list that grows; fillers are left out."""
    steps: list[list[Tokens]] = []
    at_work: list[Tokens] = []

    def note(_: Any, batch: dict[str, Any]) -> None:
        if not batch["is_filler"]:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            at_work.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in rows)

    def end_step(*_: Any) -> None:
        steps.append(list(at_work))
        at_work.clear()

    handle = register_optimizer_step_post_hook(end_step)
    try:
        with before_forward(Distiller, note):
            yield steps
    finally:
        handle.remove()


def tokens_of(store: Store, key: str) -> Tokens:
    """The token ids of a stored sample."""
    return tuple(store.read(key, ["input_ids"])["input_ids"].tolist())


class SignalInStep(TrainerCallback):
    """Sends this process a signal while it is at work on a step."""

    def __init__(self, step: int, sent: int = signal.SIGTERM):
        self.step, self.sent = step, sent

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.sent)


def train_until(
    step: int,
    config: Config,
    folder: Path,
    *,
    sent: int = signal.SIGTERM,
    match: str | None = None,
    overwrite: bool = False,
    train: Callable[..., Path] = train_student,
) -> TrainingStopped:
    """Train, stopped by a signal in this step; return the error, whose text matches `match`."""
    with pytest.raises(TrainingStopped, match=match) as stopped:
        train(config, folder, overwrite=overwrite, callbacks=[SignalInStep(step, sent)])
    return stopped.value
