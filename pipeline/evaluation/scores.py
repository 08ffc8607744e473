"""Predictions of a checkpoint on the held-out questions, kept and reused for the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cache import Store, digest_of
from pipeline.config.config import Config, EvaluateConfig
from pipeline.config.provenance import finished_identity, made_with, mark_finished, read_mark
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shard_identity import content_digest
from pipeline.data.shard_names import expand_shards
from pipeline.data.spans import check_ranges
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.evaluation.predictions import PREDICTIONS_FILE, Prediction, read_predictions
from pipeline.models.files.checkpoint import WEIGHT_FILES, Checkpoint, digest_of_tensors
from pipeline.models.teacher_plan import whole_model_digests

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", *WEIGHT_FILES)


def evaluate_checkpoint(config: Config, model: str, *, output: Path | None = None) -> list[Prediction]:
    """Return a checkpoint's predictions on the held-out questions; they are computed once for the same weights."""
    if config.evaluate is None:
        raise ConfigError("the config has no `evaluate` section; name held-out shards as evaluate.shards")
    output = output or predictions_file(config, model)
    stamp, weights = _stamp(output), _weights_of(Checkpoint(model))
    settings = config.evaluate.model_dump(mode="json", exclude={"shards", "batch_size", "metrics"})
    preparation = load_preparation(model, config.data).digests()
    identity = digest_of([weights["digest"], preparation, held_out_digests(config.evaluate), settings])
    is_known = output.is_file() and finished_identity(stamp) == identity
    # An earlier version kept no log probabilities of the references.
    if not is_known or not all(prediction.is_scored for prediction in read_predictions(output)):
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

    Reports predictions of other weights or settings through `say`.
    """
    file = predictions_file(config, config.teacher.model)
    if not file.is_file():
        return None
    stamp = _stamp(file)
    is_asked_alike = _asked(made_with(stamp)) == _asked(config.model_dump(mode="json"))
    if not (is_asked_alike and _are_the_teachers(read_mark(stamp).get("weights") or {}, config)):
        say(
            f"{file} was made with other teacher weights, or asked in another way, than this config says: the "
            "teacher is left out; run `alignkd evaluate` with this config"
        )
        return None
    return read_predictions(file)


def held_out_shards(settings: EvaluateConfig) -> list[tuple[str, str]]:
    """Return (test set, shard) of everything held out. Raises `ShardError` if one is missing or not to be read."""
    shards = [(name, shard) for name, given in settings.test_sets().items() for shard in expand_shards(given)]
    check_ranges([shard for _, shard in shards])
    return shards


def held_out_digests(settings: EvaluateConfig) -> list[tuple[str, str]]:
    """Return (test set, `content_digest` of a shard) of everything held out."""
    return [(name, content_digest(shard)) for name, shard in held_out_shards(settings)]


def _stamp(predictions: Path) -> Path:
    return predictions.with_suffix(".stamp.json")


def _asked(config: Mapping[str, Any]) -> list[Any]:
    """The settings of how a teacher is asked; which questions it answers is compared elsewhere."""
    evaluate, data = (config.get(section) or {} for section in ("evaluate", "data"))
    how = [evaluate.get(name) for name in ("max_new_tokens", "dtype")]
    return [*how, *(data.get(name) for name in ("template", "image_aspect_ratio"))]


def _weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the digest of all tensors, those of their groups (as a store has them), and the state of the files."""
    known = checkpoint.tensor_digests(checkpoint.names())
    return {
        "digest": digest_of_tensors(known),
        "groups": whole_model_digests(checkpoint.folder, known),
        "files": _file_states(checkpoint.folder),
    }


def _are_the_teachers(weights: Mapping[str, Any], config: Config) -> bool:
    """Return whether weights, as from `_weights_of`, are those of the config's teacher.

    Its files are read only if their sizes or times differ. Where the teacher is not on this machine, the stores'
    digests decide.
    """
    folder = _local_folder(config.teacher.model)
    if folder is None:
        return any(_are_of(weights, Store(cache.path)) for cache in config.all_caches())
    if weights.get("files") == _file_states(folder):
        return True
    return weights.get("digest") == Checkpoint(str(folder)).digest()


def _are_of(weights: Mapping[str, Any], store: Store) -> bool:
    """Whether every group of weights that the store's teacher read is among these."""
    known, groups = store.manifest.teacher.get("digests") or {}, weights.get("groups") or {}
    return bool(known) and all(groups.get(group) == digest for group, digest in known.items())


def _local_folder(model: str) -> Path | None:
    """A checkpoint's folder on this machine; nothing is downloaded."""
    if (folder := Path(model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _file_states(folder: Path) -> dict[str, list[int]]:
    """File -> [size in bytes, time of change in ns] of all that may hold weights, links followed."""
    files = {file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)}
    states = {file.name: file.stat() for file in sorted(files)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
