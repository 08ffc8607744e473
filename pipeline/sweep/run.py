"""Run a sweep: each experiment once, all from one store, with one line of JSON for each (see `lines.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.config import Config
from pipeline.config.provenance import provenance, recorded, replace_text
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.stores import open_stores
from pipeline.distill.student import train_student
from pipeline.distill.training.training_folder import (
    FINISHED,
    MODEL_FOLDER,
    STATE_FILE,
    check_inputs,
    holds_finished,
)
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.compare import Answered
from pipeline.evaluation.predictions import PREDICTIONS_FILE, accuracy_by_type, by_test_set
from pipeline.evaluation.scores import evaluate_checkpoint, held_out_shards
from pipeline.sweep.identity import run_identity
from pipeline.sweep.jobs import Failed, Job, attempt, run_jobs
from pipeline.sweep.lines import SUMMARY, SWEEP, Line, read_lines, write_line
from pipeline.sweep.variations import Variation


def run_sweep(
    config: Config,
    runs: Sequence[Variation],
    folder: Path,
    *,
    jobs: int = 1,
    keep_models: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> tuple[dict[str, Line], dict[str, str]]:
    """Train and evaluate the runs that are not finished; return finished runs' lines and failures' reasons, by name.

    The caller must hold the folder (`alone_in`). A run is finished if its line was made from the same config, store,
    first weights and questions. One made from others is replaced with `overwrite`, else `PipelineError` names it.
    No teacher is opened. Raises `FingerprintMismatch` before the first run if the store is another one.
    """
    _check(config, runs, folder)
    identities = {run.name: run_identity(run.config) for run in runs}
    lines, others = _finished(folder, identities, overwrite=overwrite)
    _begin(config, folder, identities)
    replaced = f", {len(others)} made with other settings and to be replaced" if others else ""
    say(f"{len(runs)} runs, {len(lines)} of them done{replaced}; {jobs} at a time -> {folder}")
    if not keep_models:
        for name in lines:  # an interrupted sweep may have left weights
            _discard_models(folder / run_folder(name))
    by_name, failed = {run.name: run for run in runs}, dict[str, str]()
    todo = [
        Job(
            name,
            train_and_evaluate,
            (run.config, folder / run_folder(name), overwrite),
            folder / run_folder(name),
        )
        for name, run in by_name.items()
        if name not in lines
    ]
    for job, outcome in run_jobs(todo, at_once=jobs) if jobs > 1 else ((job, attempt(job)) for job in todo):
        name = job.name
        if isinstance(outcome, Failed):
            failed[name] = outcome.reason
            say(f"FAILED {name}: {outcome.reason}")
            continue
        measured, answered = outcome
        lines[name] = write_line(folder, _line(by_name[name], measured, identities[name]), answered)
        if not keep_models:
            _discard_models(job.folder)
        shares = ", ".join(
            f"{test_set} {100 * by['all'][0]:.2f}" for test_set, by in measured["accuracy"].items()
        )
        say(f"[{len(lines)}/{len(runs)}] {name}: {shares} ({measured['train_seconds']:.0f} s)")
    return {name: lines[name] for name in by_name if name in lines}, failed


def _finished(
    folder: Path, identities: Mapping[str, str], *, overwrite: bool
) -> tuple[dict[str, Line], list[str]]:
    """Return the lines of finished runs, and the names of runs that were made from something else."""
    known = {line["name"]: line for line in read_lines(folder) if line["name"] in identities}
    lines = {name: line for name, line in known.items() if line["identity"] == identities[name]}
    others = [name for name in known if name not in lines]
    if others and not overwrite:
        raise PipelineError(
            f"{folder} holds {len(others)} of these runs made with other settings, data or first weights, such as "
            f"{others[0]}; give another --output, or --overwrite to train them anew in its place"
        )
    return lines, others


def _begin(config: Config, folder: Path, identities: Mapping[str, str]) -> None:
    """Write `sweep.json` and remove the summary of an earlier sweep."""
    (folder / SUMMARY).unlink(missing_ok=True)
    made = {"config": recorded(config), "runs": identities, "provenance": provenance(config)}
    replace_text(folder / SWEEP, json.dumps(made, indent=1) + "\n")


def _line(run: Variation, measured: Line, identity: str) -> Line:
    head = {"name": run.name, "values": dict(run.values), "baseline": run.baseline}
    return {**head, "folder": str(run_folder(run.name)), **measured, "identity": identity}


def run_folder(name: str) -> Path:
    """Return where a run lies in its sweep's folder."""
    return Path("runs") / name


def train_and_evaluate(config: Config, folder: Path, overwrite: bool) -> tuple[Line, dict[str, Answered]]:
    """Do one run; return its part of the line (accuracy, last terms, costs) and its answers by test set.

    A finished training of other settings is replaced only with `overwrite`; an interrupted one is trained anew.
    """
    model = train_student(config, folder, overwrite=overwrite or not holds_finished(folder))
    predictions = by_test_set(evaluate_checkpoint(config, str(model), output=folder / PREDICTIONS_FILE))
    state = json.loads((folder / STATE_FILE).read_text())
    last = next(reversed(loss_entries(state)), {})
    line = {
        "accuracy": {name: accuracy_by_type(of_set) for name, of_set in predictions.items()},
        "terms": {name: last.get(f"loss/{name}") for name in config.losses.active()},
        **costs_of(state),
        "threads": torch.get_num_threads(),
    }
    return line, {name: Answered.of(of_set) for name, of_set in predictions.items()}


def loss_entries(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a trainer state's log that hold loss terms, in the order of their steps."""
    return [entry for entry in state["log_history"] if any(key.startswith("loss/") for key in entry)]


def costs_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps, samples and seconds of a training from its state; None for what an unfinished one lacks."""
    end = next((entry for entry in reversed(state["log_history"]) if "train_runtime" in entry), {})
    return {
        "steps": state["global_step"],
        "samples_seen": end.get("samples_seen"),
        "train_seconds": end.get("train_runtime"),
        "samples_per_second": end.get("train_samples_per_second"),
    }


def _check(config: Config, runs: Sequence[Variation], folder: Path) -> None:
    """Raise, before the first run, what would stop every run."""
    if config.evaluate is None:
        raise ConfigError("a sweep compares accuracies; name held-out shards as evaluate.shards")
    held_out_shards(config.evaluate)
    open_stores(config, load_preparation(config.student.model, config.data))
    for run in runs:
        check_inputs(config, folder / run_folder(run.name))


def _discard_models(folder: Path) -> None:
    """Remove weights and checkpoints, which for large students would fill the disk; keep predictions and logs."""
    (folder / FINISHED).unlink(missing_ok=True)  # without weights the training is no longer finished
    for file in (folder / MODEL_FOLDER).glob("*.safetensors"):
        file.unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
