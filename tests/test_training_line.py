"""What a training shows while it runs: lines or a redrawn one, by the first process alone, beside a whole record."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from pipeline.distill.student import train_student
from pipeline.distill.training.trainer import NonFiniteLossError
from pipeline.distill.training.training_line import TrainingLine

TERMS = ("supervised", "attention", "vision_all", "vision_focus", "logits")
CONTROL = TrainerControl()


class Trainer(SimpleNamespace):
    """As much of a Trainer as the line asks for: 8 samples a step."""

    def __init__(self) -> None:
        callbacks = SimpleNamespace(callbacks=[])
        args = SimpleNamespace(disable_tqdm=False, load_best_model_at_end=False)
        super().__init__(state=TrainerState(max_steps=1500), args=args)
        self.callback_handler = callbacks

    def remove_callback(self, kind: type) -> None:
        pass

    def get_total_train_batch_size(self, args: Any) -> int:
        return 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def clock() -> Any:
    return SimpleNamespace(now=50.0)


def line_of(trainer: Any, clock: Any) -> TrainingLine:
    return TrainingLine(trainer, clock=lambda: clock.now)


def steps(line: TrainingLine, clock: Any, *, up_to: int, seconds: float) -> None:
    state = line.trainer.state
    while state.global_step < up_to:
        clock.now += seconds
        state.global_step += 1
        line.on_step_end(line.trainer.args, state, CONTROL)


def test_a_line_holds_step_losses_rate_speed_and_what_is_left(clock, capsys):
    line = line_of(trainer := Trainer(), clock)
    trainer.state.is_world_process_zero = True
    line.on_train_begin(trainer.args, trainer.state, CONTROL)
    steps(line, clock, up_to=1, seconds=60)  # the first step is slow, and left out of the speed
    steps(line, clock, up_to=100, seconds=0.25)
    logs = {"loss": 2.345678, "grad_norm": 1.0, "learning_rate": 1.5e-3, "loss/supervised": 2.0,
            "loss/supervised_weighted": 2.0, "loss/logits": 3.45678, "loss/logits_weighted": 0.345678,
            "gradient_share/logits": 0.5}  # fmt: skip
    line.on_log(trainer.args, trainer.state, CONTROL, logs=logs)
    assert capsys.readouterr().err == (
        "step 100 of 1,500, loss 2.346, supervised 2, logits 3.457, learning rate 0.0015, 32 samples/s, "
        "5.8 minutes left\n"
    )
    held_out = {
        "eval_loss": 0.51236,
        "eval_logits": 2.0,
        "eval_runtime": 3.21,
        "eval_samples_per_second": 7.0,
        "epoch": 1,
    }
    line.on_log(trainer.args, trainer.state, CONTROL, logs=held_out)
    assert capsys.readouterr().err == "step 100 of 1,500, held out: loss 0.5124, logits 2, in 3.2 seconds\n"
    line.on_log(trainer.args, trainer.state, CONTROL, logs={"epoch": 1})
    line.on_log(trainer.args, trainer.state, CONTROL, logs={"train_runtime": 9.0})
    line.on_train_end(trainer.args, trainer.state, CONTROL)
    assert capsys.readouterr().err == "trained to step 100 of 1,500 in 84.8 seconds\n"


def test_other_processes_show_nothing(clock, capsys):
    line = line_of(trainer := Trainer(), clock)
    trainer.state.is_world_process_zero = False
    line.on_train_begin(trainer.args, trainer.state, CONTROL)
    steps(line, clock, up_to=3, seconds=1)
    line.on_log(trainer.args, trainer.state, CONTROL, logs={"loss": 1.0})
    line.on_train_end(trainer.args, trainer.state, CONTROL)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_one_line_is_redrawn(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    line = line_of(trainer := Trainer(), clock)
    line.on_train_begin(trainer.args, trainer.state, CONTROL)
    steps(line, clock, up_to=2, seconds=1)
    line.on_log(trainer.args, trainer.state, CONTROL, logs={"loss": 1.25})
    assert "1.25" not in terminal.getvalue()  # it is drawn after the next step
    steps(line, clock, up_to=1500, seconds=1)
    line.on_train_end(trainer.args, trainer.state, CONTROL)
    *_, drawn, last = terminal.getvalue().splitlines()
    assert "step 1,500 of 1,500, loss 1.25, 8 samples/s" in drawn
    assert last.endswith("trained to step 1,500 of 1,500 in 25 minutes")


@pytest.mark.slow
def test_a_training_prints_lines_and_where_tensorboards_files_are(experiment, tmp_path, capsys):
    config = experiment.config(tmp_path, "train.report_to=tensorboard", "train.max_steps=3")
    train_student(config, tmp_path / "run")
    shown = capsys.readouterr()
    ours = [line for line in re.split(r"[\r\n]", shown.err) if not re.match("(Loading|Writing) |$", line)]
    said, *lines, end = ours
    folder = re.fullmatch(r"TensorBoard's files are in (\S+); to see them: tensorboard --logdir \1", said)
    assert shown.out == "" and folder and Path(folder[1]).is_relative_to(tmp_path / "run")
    terms = ", ".join(rf"{term} [\d.]+" for term in TERMS)
    for number, line in enumerate(lines, start=1):
        assert re.match(rf"step {number} of 3, loss [\d.]+, {terms}, learning rate 0\.001", line)
    assert len(lines) == 3 and re.search(r", [\d.]+ samples/s, [\d.e-]+ seconds? left$", lines[1])
    assert re.fullmatch(r"trained to step 3 of 3 in [\d.]+ seconds?", end)
    # The record is whole: every number of the log is in both files.
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history] == [1, 2, 3, 3] and "total_flos" in history[-1]
    written = EventAccumulator(folder[1]).Reload()
    for name in (
        "loss",
        "learning_rate",
        "grad_norm",
        *(f"loss/{t}{w}" for t in TERMS for w in ("", "_weighted")),
    ):
        values = [event.value for event in written.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in history[:3]], rel=1e-6)


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_terminal_as_it_was(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    before = sys.stdout
    config = experiment.config(
        tmp_path, "train.disable_tqdm=false", "train.learning_rate=1e30", "train.max_steps=9"
    )
    with pytest.raises(NonFiniteLossError):
        train_student(config, tmp_path / "run")
    assert sys.stderr is stream and sys.stdout is before
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1  # the cursor
