"""One experiment: train the student (and, with `baseline`, the same student without a teacher), evaluate, compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import digest_of
from pipeline.compare import accuracy_table, paired_gain
from pipeline.config import Config, LossesConfig
from pipeline.errors import ConfigError
from pipeline.evaluate import Prediction, accuracy_by_type, evaluate_model, read_predictions
from pipeline.inputs import Preparation
from pipeline.models.checkpoint import Checkpoint
from pipeline.provenance import finished_identity, mark_finished, provenance
from pipeline.shards import expand_shards
from pipeline.student import train_student

DISTILLED = "student, Align-KD"
BASELINE = "student, labels only"
TEACHER = "teacher"


def run_experiment(config: Config, *, say: Callable[[str], None]) -> str:
    """Do what is not done yet below `output_dir` and return the table of results (also in `results.json`)."""
    output = Path(config.output_dir)
    runs = {DISTILLED: (output / "align_kd", config)}
    if config.baseline:
        runs[BASELINE] = (output / "supervised", config.model_copy(update={"losses": LossesConfig()}))
    if config.evaluate is not None:
        expand_shards(config.evaluate.shards)  # a wrong path is told before the training, not after it
    models: dict[str, list[Prediction]] = {}
    if config.evaluate is not None and (teacher := _teacher_predictions(config)) is not None:
        models[TEACHER] = teacher
    for name, (folder, settings) in runs.items():
        say(f"{name}: {', '.join(settings.losses.active())} -> {folder}")
        model = train_student(settings, folder)
        if config.evaluate is not None:
            models[name] = evaluate_checkpoint(settings, str(model), output=folder / "predictions.jsonl")
    if not models:
        return f"student trained: {output / 'align_kd' / 'model'}; no `evaluate` section, so no accuracy was measured"
    return _report(config, models, output)


def evaluate_checkpoint(config: Config, model: str, *, output: Path | None = None) -> list[Prediction]:
    """Predictions of a checkpoint on the held-out questions; kept, and not made again for the same weights."""
    if config.evaluate is None:
        raise ConfigError("the config has no `evaluate` section; name held-out shards as evaluate.shards")
    output = output or _predictions_file(config, model)
    stamp = output.with_suffix(".stamp.json")
    identity = digest_of(_evaluation_identity(config, model))
    if not output.is_file() or finished_identity(stamp) != identity:
        stamp.unlink(missing_ok=True)
        evaluate_model(model, config.data, config.evaluate, output=output, description=f"evaluate {model}")
        mark_finished(stamp, identity, config)
    return read_predictions(output)


def _evaluation_identity(config: Config, model: str) -> list[Any]:
    """What predictions depend on: the weights, how they are asked, and the bytes of what they are asked."""
    assert config.evaluate is not None
    checkpoint = Checkpoint(model)
    shards = [blake3().update_mmap(shard).hexdigest() for shard in expand_shards(config.evaluate.shards)]
    preparation = Preparation.of(model, config.data).digests()
    settings = config.evaluate.model_dump(mode="json", exclude={"shards", "batch_size"})
    return [checkpoint.digest(checkpoint.names()), preparation, shards, settings]


def _predictions_file(config: Config, model: str) -> Path:
    """The teacher's below `teacher/`, where stage 2 looks for them; another model's below its own name."""
    name = "teacher" if model == config.teacher.model else model.strip("/").replace("/", "_")
    return Path(config.output_dir) / name / "predictions.jsonl"


def _teacher_predictions(config: Config) -> list[Prediction] | None:
    """Measured before, by `alignkd evaluate`: stage 2 itself opens no teacher."""
    file = _predictions_file(config, config.teacher.model)
    return read_predictions(file) if file.is_file() else None


def _report(config: Config, models: dict[str, list[Prediction]], output: Path) -> str:
    lines = []
    if TEACHER in models and [p.key for p in models[TEACHER]] != [p.key for p in models[DISTILLED]]:
        del models[TEACHER]
        lines.append(
            f"{_predictions_file(config, config.teacher.model)} answers other questions than the students: "
            "the teacher is left out; run `alignkd evaluate` with this config\n"
        )
    lines.append(accuracy_table(models))
    results = {"accuracy": {name: accuracy_by_type(p) for name, p in models.items()}}
    if BASELINE in models:
        gain = paired_gain(models[DISTILLED], models[BASELINE])
        lines.append(
            f"\nAlign-KD against labels only: {gain}\n"
            f"paired bootstrap over {gain.num_images:,} test images with {gain.num_questions:,} questions; "
            "same first weights, same data order, one training seed"
        )
        results["gain"] = asdict(gain)
    (output / "results.json").write_text(
        json.dumps(results | {"provenance": provenance(config)}, indent=1) + "\n"
    )
    return "\n".join(lines)
