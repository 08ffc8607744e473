"""Many student experiments from one store: each run once, one line of JSON a run (see `sweep_lines.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache as once
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from cache import CacheError, Store, digest_of
from pipeline.compare import Answered
from pipeline.config import Config
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluate import Prediction, accuracy_by_type, by_test_set
from pipeline.inputs import Preparation
from pipeline.models.checkpoint import Checkpoint
from pipeline.provenance import provenance
from pipeline.scores import evaluate_checkpoint, held_out_shards
from pipeline.student import MODEL_FOLDER, check_fingerprint, train_student
from pipeline.sweep.lines import Line, append_line, read_lines, replace_lines
from pipeline.sweep.variations import Variation

PREDICTIONS = "predictions.jsonl"


class RunFailedError(PipelineError):
    """A run of a sweep stopped; the others go on."""


def run_sweep(
    config: Config,
    runs: Sequence[Variation],
    folder: Path,
    *,
    jobs: int = 1,
    keep_models: bool = True,
    say: Callable[[str], None],
) -> tuple[dict[str, Line], dict[str, str]]:
    """Train and evaluate what is not done yet; lines of the finished runs and reasons of the failed, by name.

    A run is done when its line was made from the same config, store, first weights and questions.
    No teacher is opened. Raises `FingerprintMismatch` before the first run if the store is another one.
    """
    _check(config)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"config": config.model_dump(mode="json"), "runs": [run.name for run in runs]}
    (folder / "sweep.json").write_text(json.dumps(made | {"provenance": provenance(config)}, indent=1) + "\n")
    identities = {run.name: _identity(run.config) for run in runs}
    lines = _finished(folder, identities)
    todo = [run for run in runs if run.name not in lines]
    say(f"{len(runs)} runs, {len(lines)} of them done; {jobs} at a time -> {folder}")
    failed: dict[str, str] = {}
    for run, outcome in _outcomes(todo, folder, jobs):
        if isinstance(outcome, str):
            failed[run.name] = outcome
            say(f"FAILED {run.name}: {outcome}")
            continue
        lines[run.name] = append_line(folder, _line(run, outcome, identities[run.name]), outcome.answered)
        if not keep_models:
            _discard_model(folder / run_folder(run.name))
        shares = ", ".join(
            f"{name} {100 * by['all'][0]:.2f}" for name, by in outcome.line["accuracy"].items()
        )
        say(f"[{len(lines)}/{len(runs)}] {run.name}: {shares} ({outcome.line['train_seconds']:.0f} s)")
    return {run.name: lines[run.name] for run in runs if run.name in lines}, failed


def run_folder(name: str) -> Path:
    """Where a run lies in its sweep's folder."""
    return Path("runs") / name


@dataclass(frozen=True)
class Outcome:
    """What a finished run says: its part of the line, and its answers by test set."""

    line: Line
    answered: dict[str, Answered]


def train_and_evaluate(config: Config, folder: Path) -> Outcome:
    """One run: its accuracy by test set and question type, its last logged terms, and what it cost."""
    model = train_student(config, folder)
    predictions = evaluate_checkpoint(config, str(model), output=folder / PREDICTIONS)
    answered = {name: Answered.of(of_set) for name, of_set in by_test_set(predictions).items()}
    return Outcome(_measured(folder, predictions), answered)


def _measured(folder: Path, predictions: Sequence[Prediction]) -> Line:
    state = json.loads((folder / "trainer_state.json").read_text())
    *steps, totals = state["log_history"]
    last = next((entry for entry in reversed(steps) if "kd/coverage" in entry), {})
    terms = {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")}
    return {
        "accuracy": {name: accuracy_by_type(of_set) for name, of_set in by_test_set(predictions).items()},
        "terms": {name: value for name, value in terms.items() if not name.endswith("_weighted")},
        "steps": state["global_step"],
        "samples_seen": round(totals["train_samples_per_second"] * totals["train_runtime"]),
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
    check_fingerprint(Store(config.cache.path), config, preparation)


def _finished(folder: Path, identities: Mapping[str, str]) -> dict[str, Line]:
    """Lines of runs that need not run again, made from the same things; those out of date leave the file."""
    lines = read_lines(folder)
    current = [line for line in lines if line["identity"] == identities.get(line["name"], line["identity"])]
    replace_lines(folder, current)
    return {line["name"]: line for line in current if line["name"] in identities}


def _line(run: Variation, outcome: Outcome, identity: str) -> Line:
    where = str(run_folder(run.name))
    head = {"name": run.name, "values": dict(run.values), "baseline": run.baseline, "folder": where}
    return head | outcome.line | {"identity": identity}


def _identity(config: Config) -> str:
    """Everything that a run's accuracy depends on."""
    settings = config.model_dump(mode="json", include={"data", "student", "losses", "train", "targets"})
    assert config.evaluate is not None
    answers = config.evaluate.model_dump(mode="json", exclude={"batch_size"})
    ground = [_store_identity(config.cache.path), _weights_identity(config.student.model)]
    questions = [(name, _file_identity(shard)) for name, shard in held_out_shards(config.evaluate)]
    return digest_of([settings, answers, ground, questions])


@once
def _store_identity(path: str) -> list[Any]:
    store = Store(path)
    return [store.manifest.fingerprint.to_json(), list(store.parts)]


@once
def _weights_identity(model: str) -> str:
    checkpoint = Checkpoint(model)
    return checkpoint.digest(checkpoint.names())


@once
def _file_identity(file: str) -> str:
    return blake3().update_mmap(file).hexdigest()


def _outcomes(
    runs: Sequence[Variation], folder: Path, jobs: int
) -> Iterator[tuple[Variation, Outcome | str]]:
    """Each run with its line, or with the reason why it has none, as they finish."""
    if jobs == 1:
        for run in runs:
            try:
                yield run, train_and_evaluate(run.config, folder / run_folder(run.name))
            except (PipelineError, CacheError, OSError, RuntimeError) as error:
                yield run, f"{type(error).__name__}: {error}"
        return
    context = get_context("spawn")
    places = context.Queue()
    for place in range(jobs):
        places.put(place)
    with ProcessPoolExecutor(jobs, context, initializer=_take_place, initargs=(places, jobs)) as pool:
        futures = {pool.submit(_in_worker, run.config, folder / run_folder(run.name)): run for run in runs}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"


def _take_place(places: Any, jobs: int) -> None:
    """A worker's own GPU, if there are any, and its share of the cores."""
    place, num_devices = places.get(), torch.cuda.device_count()
    if num_devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % num_devices)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _in_worker(config: Config, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return train_and_evaluate(config, folder)
        except (PipelineError, CacheError, OSError) as error:
            # Some of these cannot be pickled; their sentence can.
            raise RunFailedError(f"{error} (its log: {folder / 'log.txt'})") from None


def _discard_model(folder: Path) -> None:
    """The weights go, predictions and logs stay: a sweep of large students would fill a disk."""
    for file in (folder / MODEL_FOLDER).glob("*.safetensors"):
        file.unlink()
