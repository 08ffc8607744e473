"""Predictions of a checkpoint on the held-out questions, kept and reused for the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import digest_of
from pipeline.config.config import Config, EvaluateConfig
from pipeline.config.provenance import finished_identity, made_with, mark_finished, read_mark
from pipeline.data.preparation import Preparation
from pipeline.data.shards import expand_shards
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import PREDICTIONS_FILE, Prediction, evaluate_model, read_predictions
from pipeline.evaluation.model_weights import are_the_teachers, weights_of
from pipeline.models.checkpoint import Checkpoint


def evaluate_checkpoint(config: Config, model: str, *, output: Path | None = None) -> list[Prediction]:
    """Return a checkpoint's predictions on the held-out questions; they are computed once for the same weights."""
    if config.evaluate is None:
        raise ConfigError("the config has no `evaluate` section; name held-out shards as evaluate.shards")
    output = output or predictions_file(config, model)
    stamp, weights = _stamp(output), weights_of(Checkpoint(model))
    settings = config.evaluate.model_dump(mode="json", exclude={"shards", "batch_size"})
    preparation = Preparation.of(model, config.data).digests()
    identity = digest_of([weights["digest"], preparation, held_out_digests(config.evaluate), settings])
    if not output.is_file() or finished_identity(stamp) != identity:
        stamp.unlink(missing_ok=True)
        evaluate_model(model, config.data, config.evaluate, output=output, description=f"evaluate {model}")
    if (finished_identity(stamp), read_mark(stamp).get("weights")) != (identity, weights):
        mark_finished(stamp, identity, config, weights=weights)
    return read_predictions(output)


def predictions_file(config: Config, model: str) -> Path:
    """Return the file below `output_dir`: the teacher's in `teacher/`, where stage 2 looks; others by their name."""
    name = "teacher" if model == config.teacher.model else model.strip("/").replace("/", "_")
    return Path(config.output_dir) / name / PREDICTIONS_FILE


def teacher_predictions(config: Config, *, say: Callable[[str], None]) -> list[Prediction] | None:
    """Return what `alignkd evaluate` measured of the teacher, which stage 2 never opens; None if nothing that fits.

    If there are predictions of other weights or settings, says so.
    """
    file = predictions_file(config, config.teacher.model)
    if not file.is_file():
        return None
    stamp = _stamp(file)
    is_asked_alike = _asked(made_with(stamp)) == _asked(config.model_dump(mode="json"))
    if not (is_asked_alike and are_the_teachers(read_mark(stamp).get("weights") or {}, config)):
        say(
            f"{file} is of another teacher's weights, or was asked otherwise, than this config says: the teacher is "
            "left out; run `alignkd evaluate` with this config"
        )
        return None
    return read_predictions(file)


def held_out_shards(settings: EvaluateConfig) -> list[tuple[str, str]]:
    """Return (test set, shard) of everything held out. Raises `ShardError` if one is missing."""
    return [(name, shard) for name, shards in settings.test_sets().items() for shard in expand_shards(shards)]


def held_out_digests(settings: EvaluateConfig) -> list[tuple[str, str]]:
    """Return (test set, digest of a shard's bytes) of everything held out."""
    return [(name, blake3().update_mmap(shard).hexdigest()) for name, shard in held_out_shards(settings)]


def _stamp(predictions: Path) -> Path:
    return predictions.with_suffix(".stamp.json")


def _asked(config: Mapping[str, Any]) -> list[Any]:
    """The settings of how a teacher is asked; which questions it answers is compared elsewhere."""
    evaluate, data = (config.get(section) or {} for section in ("evaluate", "data"))
    how = [evaluate.get(name) for name in ("max_new_tokens", "dtype")]
    return [*how, *(data.get(name) for name in ("template", "image_aspect_ratio"))]
