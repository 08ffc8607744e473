"""Many student experiments from one store: each run once, one line of JSON a run (see `lines.py`)."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.config import Config
from pipeline.config.provenance import provenance
from pipeline.data.preparation import Preparation
from pipeline.distill.join.stores import open_stores
from pipeline.distill.student import train_student
from pipeline.distill.training.training_folder import (
    FINISHED,
    MODEL_FOLDER,
    STATE_FILE,
    check_inputs,
    holds_finished,
)
from pipeline.errors import ConfigError, PipelineError, writing
from pipeline.evaluation.compare import Answered
from pipeline.evaluation.evaluate import PREDICTIONS_FILE, Prediction, accuracy_by_type, by_test_set
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
    """Train and evaluate what is not done yet; lines of the finished runs and reasons of the failed, by name.

    The caller holds the folder (`alone_in`). A run is done when its line was made from the same config, store, first
    weights and questions; runs made from others are replaced only with `overwrite`, else `PipelineError` names one.
    No teacher is opened. Raises `FingerprintMismatch` before the first run if the store is another one.
    """
    _check(config)
    for run in runs:  # whose models may be discarded
        check_inputs(config, folder / run_folder(run.name))
    identities = {run.name: run_identity(run.config) for run in runs}
    lines, others = _finished(folder, identities)
    if others and not overwrite:
        raise PipelineError(
            f"{folder} holds {len(others)} of these runs made with other settings, data or first weights, such as "
            f"{others[0]}; give another --output, or --overwrite to train them anew in its place"
        )
    _begin(config, folder, identities)
    replaced = f", {len(others)} made with other settings and to be replaced" if others else ""
    say(f"{len(runs)} runs, {len(lines)} of them done{replaced}; {jobs} at a time -> {folder}")
    if not keep_models:
        for name in lines:  # a kill may have come before the weights went
            _discard_models(folder / run_folder(name))
    failed: dict[str, str] = {}
    todo = [run for run in runs if run.name not in lines]
    for run, outcome in _outcomes(todo, folder, jobs, overwrite=overwrite):
        if isinstance(outcome, Failed):
            failed[run.name] = outcome.reason
            say(f"FAILED {run.name}: {outcome.reason}")
            continue
        line = _line(run, outcome, identities[run.name])
        lines[run.name] = write_line(folder, line, outcome.answered)
        if not keep_models:
            _discard_models(folder / run_folder(run.name))
        shares = ", ".join(
            f"{name} {100 * by['all'][0]:.2f}" for name, by in outcome.line["accuracy"].items()
        )
        say(f"[{len(lines)}/{len(runs)}] {run.name}: {shares} ({outcome.line['train_seconds']:.0f} s)")
    return {run.name: lines[run.name] for run in runs if run.name in lines}, failed


def _begin(config: Config, folder: Path, identities: Mapping[str, str]) -> None:
    """Write down what this sweep is of; the summary of an earlier one does not outlive that."""
    (folder / SUMMARY).unlink(missing_ok=True)
    made = {"config": config.model_dump(mode="json"), "runs": dict(identities)}
    with writing(folder / SWEEP):
        (folder / SWEEP).write_text(json.dumps(made | {"provenance": provenance(config)}, indent=1) + "\n")


def run_folder(name: str) -> Path:
    """Where a run lies in its sweep's folder."""
    return Path("runs") / name


@dataclass(frozen=True)
class Outcome:
    """What a finished run says: its part of the line, and its answers by test set."""

    line: Line
    answered: dict[str, Answered]


def train_and_evaluate(config: Config, folder: Path, overwrite: bool = False) -> Outcome:
    """One run: its accuracy by test set and question type, its last logged terms, and what it cost.

    A finished training of other settings is replaced only with `overwrite`; what a kill cut short is trained anew.
    """
    model = train_student(config, folder, overwrite=overwrite or not holds_finished(folder))
    predictions = evaluate_checkpoint(config, str(model), output=folder / PREDICTIONS_FILE)
    answered = {name: Answered.of(of_set) for name, of_set in by_test_set(predictions).items()}
    return Outcome(_measured(config, folder, predictions), answered)


def _measured(config: Config, folder: Path, predictions: Sequence[Prediction]) -> Line:
    state = json.loads((folder / STATE_FILE).read_text())
    *steps, totals = state["log_history"]
    last = next((entry for entry in reversed(steps) if "loss" in entry), {})
    return {
        "accuracy": {name: accuracy_by_type(of_set) for name, of_set in by_test_set(predictions).items()},
        "terms": {name: last.get(f"loss/{name}") for name in config.losses.active()},
        "steps": state["global_step"],
        "samples_seen": totals["samples_seen"],
        "train_seconds": totals["train_runtime"],
        "samples_per_second": totals["train_samples_per_second"],
        "threads": torch.get_num_threads(),
    }


def _check(config: Config) -> None:
    """What would stop every run is told before the first."""
    if config.evaluate is None:
        raise ConfigError("a sweep compares accuracies; name held-out shards as evaluate.shards")
    held_out_shards(config.evaluate)
    preparation = Preparation.of(config.student.model, config.data)
    open_stores(config, preparation)


def _finished(folder: Path, identities: Mapping[str, str]) -> tuple[dict[str, Line], list[str]]:
    """Lines of runs that need not run again, made from the same things, and names of those made from others."""
    known = [line for line in read_lines(folder) if line["name"] in identities]
    current = {line["name"]: line for line in known if line["identity"] == identities[line["name"]]}
    return current, [line["name"] for line in known if line["name"] not in current]


def _line(run: Variation, outcome: Outcome, identity: str) -> Line:
    where = str(run_folder(run.name))
    head = {"name": run.name, "values": dict(run.values), "baseline": run.baseline, "folder": where}
    return head | outcome.line | {"identity": identity}


def _outcomes(
    runs: Sequence[Variation], folder: Path, jobs: int, *, overwrite: bool
) -> Iterator[tuple[Variation, Outcome | Failed]]:
    """Each run with what it says, or with why it says nothing, as they finish."""
    by_name = {run.name: run for run in runs}
    todo = [
        Job(
            run.name,
            train_and_evaluate,
            (run.config, folder / run_folder(run.name), overwrite),
            folder / run_folder(run.name),
        )
        for run in runs
    ]
    finished = run_jobs(todo, at_once=jobs) if jobs > 1 else ((job, attempt(job)) for job in todo)
    for job, outcome in finished:
        yield by_name[job.name], outcome


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, made if need be: two in one would train into the same runs."""
    with writing(folder, then="give this user the right to write there, or give another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PipelineError(
                f"{folder}: another sweep is at work there; wait for it, or give another --output"
            ) from error
        yield


def _discard_models(folder: Path) -> None:
    """The weights go, checkpoints' too; predictions and logs stay: a sweep of large students would fill a disk."""
    (folder / FINISHED).unlink(missing_ok=True)  # without weights the training is no longer done
    for file in (folder / MODEL_FOLDER).glob("*.safetensors"):
        file.unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
