"""Stage 2: train the student from the store, or several, with transformers.Trainer. No teacher weight is opened."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from cache import Store, digest_of
from pipeline.adapters import add_adapters
from pipeline.config import Config
from pipeline.dataset import JoinCollator, JoinedDataset
from pipeline.distiller import Distiller
from pipeline.errors import ConfigError, TrainingStopped, building, writing
from pipeline.inputs import Preparation
from pipeline.losses import LOSSES
from pipeline.models.checkpoint import Checkpoint, checkpoint_folder
from pipeline.models.configuration import read_config
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.pairing import check_pair
from pipeline.processes import is_first_process, num_processes
from pipeline.provenance import finished_identity, mark_finished, read_mark, save_provenance
from pipeline.recompute import load_recomputed
from pipeline.resuming import CORRECT_TRAIN
from pipeline.stores import open_stores, targets_read, teacher_facts
from pipeline.trainer import HEADS_FILE, RUN_FILE, DistillTrainer
from pipeline.training_arguments import HOW_IT_RUNS, NO_FLOAT16, OF_THE_LOG, samples_per_step

MODEL_FOLDER = "model"
FINISHED = "finished.json"
STATE_FILE = "trainer_state.json"  # transformers' own name for it


def train_student(config: Config, folder: Path) -> Path:
    """Train one student into `folder` and return its model's folder, in MobileVLM's own layout, without heads.

    A finished run of the same config, store and first weights is left as it is. Raises `FingerprintMismatch`
    before any weight is opened if a store is not what this config would have cached. What the stores lack is told
    on stderr.
    """
    preparation = Preparation.of(config.student.model, config.data)
    stores = open_stores(config, preparation)
    targets, data = needed_targets(config), config.data
    dataset = JoinedDataset(stores, data.shards, preparation, targets=targets, fraction=data.fraction)
    for missing in dataset.missing:
        print(f"on_missing: {config.on_missing}: {missing}", file=sys.stderr)
    finished, identity = folder / FINISHED, run_identity(config, dataset)
    samples = samples_per_step(config.train, num_processes())
    if finished_with(finished, identity) == samples:
        return folder / MODEL_FOLDER
    resumed = checkpoint_to_resume(config, folder, identity)
    if is_first_process():
        finished.unlink(missing_ok=True)
        _save_origin(folder, config, dataset)
    trainer = build_trainer(config, folder, dataset, identity=identity)
    with (
        redirect_stdout(sys.stderr),
        trainer.stop,
    ):  # the Trainer prints its log; standard output is for results
        trainer.train(resume_from_checkpoint=resumed)
        _finish(trainer, folder)
    if trainer.is_world_process_zero():
        mark_finished(finished, identity, config, samples_per_step=samples)
    trainer.accelerator.wait_for_everyone()
    if trainer.stop.is_asked:
        raise TrainingStopped(
            f"{folder}: trained to its end before SIGTERM stopped the rest; run the same command for what follows"
        )
    return folder / MODEL_FOLDER


def _finish(trainer: DistillTrainer, folder: Path) -> None:
    """Write the trained student. Raises `TrainingStopped` if SIGTERM ended the training before its end."""
    done, whole = trainer.state.global_step, trainer.state.max_steps
    if done < whole:
        raise TrainingStopped(
            f"{folder}: stopped by SIGTERM after step {done} of {whole}, checkpoint-{done} is written; go on with "
            "train.resume_from_checkpoint=true"
        )
    with writing(folder / MODEL_FOLDER):
        trainer.save_student(folder / MODEL_FOLDER)
    if trainer.is_world_process_zero():
        with writing(folder / STATE_FILE):
            trainer.state.save_to_json(str(folder / STATE_FILE))


def _save_origin(folder: Path, config: Config, dataset: JoinedDataset) -> None:
    stores = dataset.stores
    save_provenance(
        folder,
        config,
        stores=stores.to_json(),
        allowed_mismatches=[asdict(difference) | {"store": path} for path, difference in stores.allowed],
        missing=[asdict(missing) for missing in dataset.missing],
    )


def run_identity(config: Config, dataset: JoinedDataset) -> str:
    """What a run must agree with to be gone on with: all that its weights depend on, but for the samples of a step.

    A finished run is kept if it agrees in those, too: see `finished_with`.
    """
    read = {"cache"} if config.caches is None else {"caches", "on_missing"}
    settings = config.model_dump(
        mode="json", include={"student", "data", "targets", "losses", "train"} | read
    )
    for cache in settings.get("caches") or [settings["cache"]]:
        del cache["mirror"], cache["mirror_bytes"]  # where bytes are kept changes none of them
    left_out = OF_THE_LOG + HOW_IT_RUNS
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in left_out}
    fingerprints = [store.manifest.fingerprint.to_json() for store in dataset.stores.opened]
    stored: Any = fingerprints[0]
    if config.caches is not None:  # of several teachers the config's is the stub's
        stub = config.teacher.model if config.targets.recomputed() else None
        stored = [fingerprints, [missing.count for missing in dataset.missing], stub]
    first_weights = Checkpoint(config.student.model).digest()
    return digest_of([settings, stored, len(dataset), first_weights])


def finished_with(mark: Path, identity: str) -> int | None:
    """The samples of a step with which this run was finished, None if it was not."""
    said = read_mark(mark)
    return said.get("samples_per_step") if said.get("identity") == identity else None


def checkpoint_to_resume(config: Config, folder: Path, identity: str) -> str | None:
    """`train.resume_from_checkpoint`: true means this run's last checkpoint, if there is one yet.

    Raises `ConfigError` if what is there was made with other settings: going on from it would be neither run. So it
    does if the run is finished, for then it was so with other samples a step.
    """
    asked = config.train.get("resume_from_checkpoint")
    if asked in (None, False):
        return None
    found = _whole_checkpoints(folder) if asked is True else [Path(asked)]
    if asked is not True and (found[0].resolve().parent != folder.resolve() or not _is_whole(found[0])):
        raise ConfigError(
            f"train.resume_from_checkpoint: {asked} is no checkpoint of the run in {folder}; give `true` to go on "
            "from the last checkpoint of each run"
        )
    own = [checkpoint for checkpoint in found if finished_identity(checkpoint / RUN_FILE) == identity]
    if found and not own:
        raise ConfigError(
            f"train.resume_from_checkpoint: {found[0]} was made with other settings, data or first weights; restore "
            "them, give another output_dir, or remove it to start anew"
        )
    if own and (samples := finished_with(folder / FINISHED, identity)) is not None:
        raise ConfigError(
            f"train.resume_from_checkpoint: {folder} is finished, with {samples} samples a step, and cannot go on "
            "with others; restore them, give another output_dir, or remove it to start anew"
        )
    # Of runs that began anew in this folder the last; they may differ in the samples of a step.
    return str(max(own, key=lambda checkpoint: read_mark(checkpoint / RUN_FILE)["began"])) if own else None


def _whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were written to their end, the newest first."""
    found = {file.name.removeprefix("checkpoint-"): file for file in folder.glob("checkpoint-*")}
    steps = sorted((int(step) for step in found if step.isdigit()), reverse=True)
    return [found[str(step)] for step in steps if _is_whole(found[str(step)])]


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file is there, and whole, that transformers writes last; and the heads, which it does not know."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return (checkpoint / HEADS_FILE).is_file()


def needed_targets(config: Config) -> dict[str, Any]:
    """The stored targets that the configured losses read, by name."""
    read = targets_read(config)
    return {name: settings for name, settings in config.targets.cached().items() if name in read}


def build_trainer(config: Config, folder: Path, dataset: JoinedDataset, *, identity: str) -> DistillTrainer:
    """Student, heads, optimizer and data, seeded: runs that differ in losses alone see the same data order.

    `identity` of the run goes into its checkpoints.
    """
    arguments, stores = training_arguments(config, folder), dataset.stores
    with building(
        f"student.model {config.student.model}", then="correct the `student` section, or train.seed"
    ):
        set_seed(arguments.seed)
        student = load_student(config, *stores.opened)
        if config.student.lora is not None:
            add_adapters(student, config.student.lora)
    reads_teacher = any(LOSSES[name].targets for name in config.losses.active())
    missing = {name: stores.giving(name).store for name in dataset.lacking()}
    recompute = (
        load_recomputed(config, *stores.opened, device=arguments.device, missing=missing)
        if reads_teacher
        else None
    )
    distiller = Distiller(
        student,
        config.losses.active(),
        facts=stores.facts(recompute.facts if recompute else {}),
        patch_feature_cache_bytes=config.student.patch_feature_cache_bytes,
        recompute=recompute,
    )
    with building("train: the trainer cannot be built", then=CORRECT_TRAIN):
        return DistillTrainer(
            model=distiller,
            args=arguments,
            train_dataset=dataset,
            data_collator=JoinCollator(dataset.targets),
            settings=config,
            identity=identity,
        )


def load_student(config: Config, *stores: Store) -> MobileVLMForCausalLM:
    """The student's first weights. Raises `ConfigError` if it cannot be held to the teacher of each store."""
    shape = read_config(checkpoint_folder(config.student.model))
    for store in stores:
        check_pair(config, shape, teacher_facts(store), of=store.path)
    student = MobileVLMForCausalLM.from_pretrained(config.student.model, dtype=config.student.dtype)
    if config.student.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def training_arguments(config: Config, folder: Path) -> TrainingArguments:
    """`train:` as transformers takes it; what it refuses becomes a `ConfigError`."""
    given = {name: value for name, value in config.train.items() if name != "resume_from_checkpoint"}
    ours: dict[str, Any] = {
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    with building("train: transformers refuses these arguments", then=CORRECT_TRAIN):
        arguments = TrainingArguments(output_dir=str(folder), **ours | given)
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # one that is not installed says so now, not after the weights are loaded
    if arguments.fp16 and arguments.device.type == "cpu":  # here alone: elsewhere the config may be for a GPU
        raise ConfigError(f"{NO_FLOAT16}, and there is no GPU here; set train.bf16, or neither")
    return one_device_a_process(arguments)


def one_device_a_process(arguments: TrainingArguments) -> TrainingArguments:
    """Where a process sees several GPUs it takes the first; several are for several processes (torchrun).

    Left alone, the Trainer would cut every batch into one piece a GPU, and the images do not lie sample by sample.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
