"""Read the files of a run's folder: loss curves and provenance. A damaged file is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.report.findings import Origin
from pipeline.sweep.run import costs_of, loss_entries

PROVENANCE = "provenance.json"


def read_run(folder: Path, label: str = "") -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return a training's line, as a sweep has it, with a label, and its history, as in `TrainingRun`."""
    state = read_json(folder / STATE_FILE)
    with named_if_damaged(folder / STATE_FILE):
        history = [
            {"step": entry["step"]}
            | {key: float(x) for key, x in entry.items() if key.startswith(("loss/", "gradient_share/"))}
            for entry in loss_entries(state)
        ]
        keys = {key.removeprefix("loss/") for entry in history for key in entry if key.startswith("loss/")}
        terms = [key for key in keys if not key.endswith("_weighted")]
        beside = list(_observed(state, terms))
        observed = {key.removeprefix("observed/") for entry in beside for key in entry if key != "step"}
        held_out = _held_out(state, [*terms, *observed])
        history = sorted([*history, *beside, *held_out], key=lambda entry: entry["step"])
        line = {"name": folder.resolve().name, "label": label, "terms": terms, **costs_of(state)}
        return line | {"threads": None}, history


def _observed(state: dict[str, Any], terms: Iterable[str]) -> Iterator[dict[str, float]]:
    """Yield what is logged beside the losses: x/y is observed with the term x."""
    beginnings = tuple(f"{term}/" for term in terms)
    for entry in loss_entries(state):
        if found := {f"observed/{key}": float(x) for key, x in entry.items() if key.startswith(beginnings)}:
            yield {"step": entry["step"]} | found


def _held_out(state: dict[str, Any], terms: Iterable[str]) -> Iterator[dict[str, float]]:
    for entry in state["log_history"]:
        if found := {f"held_out/{x}": float(entry[f"eval_{x}"]) for x in terms if f"eval_{x}" in entry}:
            yield {"step": entry["step"]} | found


def origin_of(folders: Iterable[Path]) -> Origin:
    """Return the origin of all runs whose provenance is there."""
    provenances = []
    for file in (folder / PROVENANCE for folder in folders):
        if file.is_file():
            provenances.append(read_json(file))
            with named_if_damaged(file):
                Origin.of(provenances[-1:])
    return Origin.of(provenances)


def read_json(file: Path) -> Any:
    """Return a JSON file's value. Raises `PipelineError` if the file is missing or no JSON."""
    if not file.is_file():
        raise PipelineError(f"{file} is missing; run the command that writes it, to its end")
    with named_if_damaged(file):
        return json.loads(file.read_text())


@contextmanager
def named_if_damaged(file: Path) -> Iterator[None]:
    """Turn errors of reading a file's values into a `PipelineError` that names it."""
    try:
        yield
    except PipelineError:
        raise  # it names its own file
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PipelineError(
            f"{file} is damaged, or another version wrote it: {type(error).__name__}: {error}; "
            "take it from a copy, or remove it and run the command that writes it again"
        ) from error
