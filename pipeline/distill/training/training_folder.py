"""The folder of a training: what it holds, and whether a training may begin, resume or replace something there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.config.provenance import read_mark
from pipeline.distill.training.run_identity import OPEN_SCHEDULES, Change, RunIdentity, is_longer
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import PROCESSOR_FILES, Checkpoint

RUN_FILE = "run.json"  # of a checkpoint: the run that it belongs to, and the sums that are not logged yet
HEADS_FILE = "heads.safetensors"  # of a checkpoint, too
MODEL_FOLDER = "model"
FINISHED = "finished.json"
STATE_FILE = "trainer_state.json"  # transformers' own name for it
OF_A_MODEL = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
              *PROCESSOR_FILES)  # fmt: skip
ANSWERS = "predictions.*"  # of the student, and their stamp
RESUME = "train.resume_from_checkpoint=true"
ELSEWHERE = "give another output_dir"
INSTEAD = f"{ELSEWHERE}, or --overwrite to train anew in its place"


@dataclass(frozen=True)
class Product:
    """What a training leaves: the name of its folder in the run's, and a look for what cannot be read in it.

    `look` raises `ConfigError`.
    """

    folder: str
    look: Callable[[Path], None]


def _look_at_student(folder: Path) -> None:
    read_config(folder)
    Checkpoint(str(folder)).check_files()


STUDENT = Product(MODEL_FOLDER, _look_at_student)


@dataclass(frozen=True)
class Start:
    """Where a training begins: at a checkpoint, or anew, in place of what is there if `replaces`."""

    checkpoint: Path | None = None
    replaces: bool = False


def start_of(
    config: Config, folder: Path, identity: RunIdentity, *, overwrite: bool, product: Product = STUDENT
) -> Start:
    """Return where to begin. Without `overwrite` nothing that a training left is replaced, or mixed with another's.

    Raises `PipelineError` naming what differs, or how to resume; `ConfigError` if the config asks for a checkpoint
    of another run.
    """
    check_inputs(config, folder, product)
    mark, checkpoints = read_mark(folder / FINISHED), _asked_checkpoints(config, folder)
    asked = config.train.get("resume_from_checkpoint")
    resumes = asked not in (None, False)
    own = [file for file in checkpoints if identity.may_lengthen(read_mark(file / RUN_FILE))]
    is_readable = bool(mark) or not (folder / FINISHED).exists()
    changes = identity.changes(mark) if mark else []
    if resumes and own and is_readable and (not changes or is_longer(changes)):
        return Start(checkpoint=own[0])
    if overwrite and asked not in (None, False, True):
        raise ConfigError(
            f"train.resume_from_checkpoint: {_origin(checkpoints[0], identity)}, and --overwrite would remove it; "
            f"restore them, or {ELSEWHERE}"
        )
    is_empty = not (checkpoints or (folder / FINISHED).exists() or has_weights(folder, product))
    if overwrite or is_empty:
        return Start(replaces=not is_empty)
    if mark or not is_readable or not checkpoints:
        work = _finished_work(folder, mark, identity, has_checkpoint=bool(own), product=product)
        raise PipelineError(f"{work}{INSTEAD}")
    if own and not resumes:
        raise PipelineError(
            f"{folder} holds {own[0].name} of this training; {RESUME} resumes it, --overwrite trains anew in "
            "its place"
        )
    if resumes:
        raise ConfigError(
            f"train.resume_from_checkpoint: {_origin(checkpoints[0], identity)}; restore them, {INSTEAD}"
        )
    raise PipelineError(f"{_origin(checkpoints[0], identity)}; {INSTEAD}")


def _finished_work(
    folder: Path, mark: dict[str, Any], identity: RunIdentity, *, has_checkpoint: bool, product: Product
) -> str:
    """Return the beginning of a refusal: what the folder holds that may be finished, and how to use it."""
    if not mark and (folder / FINISHED).exists():
        return f"{folder / FINISHED} cannot be read: what is trained there may be finished; restore it, "
    if not mark:
        return (
            f"{folder / product.folder} holds weights, and there is no {FINISHED} to say what they were trained "
            "with; "
        )
    changes = identity.changes(mark)
    if not changes:
        return (
            f"{folder} holds this training, finished, but its model cannot be used: {model_fault(folder, product)}; "
            "restore it, "
        )
    if not is_longer(changes) or not identity.has_open_schedule():
        return f"{folder} holds a finished training, {_made_with(changes, identity)}; "
    how = (
        f"which {RESUME} makes longer"
        if has_checkpoint
        else "but without a checkpoint to make it longer from"
    )
    return f"{folder} holds a finished training, {_listed(changes)}, {how}; "


def is_finished(folder: Path, identity: RunIdentity, product: Product = STUDENT) -> bool:
    """Whether the folder holds this training, finished, with its model."""
    mark = read_mark(folder / FINISHED)
    return bool(mark) and not identity.changes(mark) and model_fault(folder, product) is None


def holds_finished(folder: Path) -> bool:
    """Whether a training of any settings has finished here, even if its mark is gone."""
    return (folder / FINISHED).exists() or ((folder / STATE_FILE).exists() and has_weights(folder))


def has_weights(folder: Path, product: Product = STUDENT) -> bool:
    """Whether weights, ours or foreign, lie where a training writes its product."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return any(file for pattern in patterns for file in (folder / product.folder).glob(pattern))


def model_fault(folder: Path, product: Product = STUDENT) -> str | None:
    """Return why what was trained here cannot be read (a file is missing, cut or foreign), or None."""
    try:
        product.look(folder / product.folder)
    except ConfigError as error:
        return str(error).split("; ")[0]  # without its advice: here the caller gives another
    return None


def check_inputs(config: Config, folder: Path, product: Product = STUDENT) -> None:
    """Raise `PipelineError` if an input of the training lies in a folder that the training may have to remove."""
    places = [place.resolve() for place in (folder / product.folder, *_checkpoints(folder))]
    for key, name in _inputs(config):
        path = Path(name)
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
        followed = [file.resolve() for file in (path, *files)]
        if any(file.is_relative_to(place) for file in followed for place in places):
            raise PipelineError(
                f"{key} {name} lies among the model and checkpoints of {folder}, which a training there replaces; "
                f"{ELSEWHERE}"
            )


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    """Yield key and path of each input. A hub id or URL is a path where nothing lies."""
    yield from (("student.model", config.student.model), ("teacher.model", config.teacher.model))
    yield from (("cache.path", cache.path) for cache in config.all_caches())
    held_out = {} if config.evaluate is None else config.evaluate.test_sets()
    every = [
        ("data.shards", config.data.shards),
        ("data.held_out_shards", config.data.held_out_shards or []),
        *(("evaluate.shards", shards) for shards in held_out.values()),
    ]
    for key, shards in every:
        yield from ((key, shard) for shard in ([shards] if isinstance(shards, str) else shards))


def _origin(checkpoint: Path, identity: RunIdentity) -> str:
    return f"{checkpoint} was {_made_with(identity.changes(read_mark(checkpoint / RUN_FILE)), identity)}"


def _made_with(changes: Sequence[Change], identity: RunIdentity) -> str:
    return f"made with other settings: {_listed(changes)}{_no_other_length(changes, identity)}"


def _no_other_length(changes: Sequence[Change], identity: RunIdentity) -> str:
    """Return why the length of the run cannot change, if nothing else differs."""
    if [change.key for change in changes] not in (["train.max_steps"], ["train.num_train_epochs"]):
        return ""
    if not is_longer(changes):
        return " (a run can be made longer, not shorter)"
    return (
        f" (a run cannot be made longer under train.lr_scheduler_type {identity.schedule()}: the learning rate of "
        f"every step would have been another; it can under {', '.join(OPEN_SCHEDULES)}, with a warm-up in steps)"
    )


def _listed(changes: Sequence[Change]) -> str:
    return ", ".join(str(change) for change in changes)


def _asked_checkpoints(config: Config, folder: Path) -> list[Path]:
    """Return the whole checkpoints of the folder, the newest first, or the one that the config names by its path."""
    asked = config.train.get("resume_from_checkpoint")
    if asked in (None, False, True):
        return [file for file in _checkpoints(folder) if _is_whole(file)]
    if Path(asked).resolve().parent != folder.resolve() or not _is_whole(Path(asked)):
        raise ConfigError(
            f"train.resume_from_checkpoint: {asked} is no checkpoint of the run in {folder}; give `true` to resume "
            "from the last checkpoint of each run"
        )
    return [Path(asked)]


def _checkpoints(folder: Path) -> list[Path]:
    found = {file.name.removeprefix("checkpoint-"): file for file in folder.glob("checkpoint-*")}
    return [found[str(step)] for step in sorted((int(s) for s in found if s.isdigit()), reverse=True)]


def _is_whole(checkpoint: Path) -> bool:
    # transformers writes the state last; the heads are ours.
    return bool(read_mark(checkpoint / STATE_FILE)) and (checkpoint / HEADS_FILE).is_file()


def remove_training(folder: Path, product: Product = STUDENT) -> list[str]:
    """Remove what a training left, and nothing else: mark, checkpoints, model, answers. Return their names."""
    model = folder / product.folder
    left = [folder / FINISHED, folder / STATE_FILE, *_checkpoints(folder), *folder.glob(ANSWERS)]
    left += [file for pattern in OF_A_MODEL for file in model.glob(pattern)]
    left = [file for file in left if file.exists()]
    for file in left:  # the mark first: a half removed training is not finished
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    if model.is_dir() and not any(model.iterdir()):
        model.rmdir()
    return [str(file.relative_to(folder)) for file in left]
