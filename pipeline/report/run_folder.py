"""What a training left in its folder: loss curves, throughput and provenance, read or named as damaged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.losses.losses import LOSSES
from pipeline.report.findings import LogLine, Origin, TrainingRun

PROVENANCE = "provenance.json"


def read_run(folder: Path, label: str) -> TrainingRun:
    """One finished training. Raises `PipelineError` naming the file that is damaged."""
    state = read_json(folder / STATE_FILE)
    with named_if_damaged(folder / STATE_FILE):
        history, end = loss_history(state), _last_line(state)
        terms = terms_of(history)
        return TrainingRun(
            label=label,
            name=folder.name,
            terms=terms,
            reads_teacher=reads_teacher(terms),
            history=history,
            steps=state["global_step"],
            samples_seen=end.get("samples_seen"),
            train_seconds=end.get("train_runtime"),
            samples_per_second=end.get("train_samples_per_second"),
            threads=None,
        )


def loss_history(state: Mapping[str, Any]) -> tuple[LogLine, ...]:
    """The log lines that hold loss terms, in the order of their steps."""
    lines = (line for line in state["log_history"] if any(key.startswith("loss/") for key in line))
    return tuple(LogLine(line["step"], _numbers_of_terms(line)) for line in lines)


def _numbers_of_terms(line: Mapping[str, Any]) -> dict[str, float]:
    prefixes = ("loss/", "gradient_share/")
    return {key: float(value) for key, value in line.items() if key.startswith(prefixes)}


def terms_of(history: Iterable[LogLine]) -> tuple[str, ...]:
    """The loss terms that were logged."""
    keys = {key for line in history for key in line.values if key.startswith("loss/")}
    return in_order(key.removeprefix("loss/") for key in keys if not key.endswith("_weighted"))


def in_order(terms: Iterable[str]) -> tuple[str, ...]:
    """As the table of losses has them, which a saved log does not keep; those that it has no more come last."""
    order = list(LOSSES)
    return tuple(sorted(terms, key=lambda name: (order.index(name) if name in order else len(order), name)))


def reads_teacher(terms: Iterable[str]) -> bool:
    """Whether a run with these terms would need the teacher if there were no store: labels only does not."""
    return any(LOSSES[name].targets for name in terms if name in LOSSES)


def origin_of(folders: Iterable[Path]) -> Origin:
    """Of all runs whose provenance is there: the latest time and its versions, every commit and command once."""
    origins = []
    for file in (folder / PROVENANCE for folder in folders):
        if file.is_file():
            made = read_json(file)
            with named_if_damaged(file):
                origins.append(Origin.of(made))
    if not origins:
        return Origin()
    origins.sort(key=lambda origin: origin.created)
    commits = dict.fromkeys(commit for origin in origins for commit in origin.commits)
    commands = dict.fromkeys(command for origin in origins for command in origin.commands)
    return Origin(origins[-1].created, tuple(commits), tuple(commands), origins[-1].versions)


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises `PipelineError` if it is not there, or is no JSON."""
    if not file.is_file():
        raise PipelineError(f"{file} is not there; run the command that writes it to its end")
    with named_if_damaged(file):
        return json.loads(file.read_text())


@contextmanager
def named_if_damaged(file: Path) -> Iterator[None]:
    """A file that does not hold what it must becomes a `PipelineError` that names it."""
    try:
        yield
    except PipelineError:
        raise  # it names its own file
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PipelineError(
            f"{file} is damaged, or another version wrote it: {type(error).__name__}: {error}; "
            "take it from a copy, or remove it and run the command that writes it again"
        ) from error


def _last_line(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the Trainer logs when it is done: time and throughput; empty if it was not."""
    return next((line for line in reversed(state["log_history"]) if "train_runtime" in line), {})
