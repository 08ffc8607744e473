"""Stage 2: train the student from one store or several, with transformers.Trainer, and without the teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from functools import cache as once
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pipeline.config.config import Config
from pipeline.config.provenance import mark_finished, save_provenance
from pipeline.config.training_arguments import NO_FLOAT16
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.parts import build_distiller, load_student, open_dataset, open_held_out
from pipeline.distill.training.processes import alone_in, check_together, is_first_process, num_processes
from pipeline.distill.training.resuming import CORRECT_TRAIN, one_device_a_process
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.trainer import DistillTrainer
from pipeline.distill.training.training_folder import (
    FINISHED,
    MODEL_FOLDER,
    RESUME,
    STATE_FILE,
    Start,
    is_finished,
    remove_training,
    start_of,
)
from pipeline.errors import ConfigError, TrainingStopped, building, needing, writing


def train_student(
    config: Config, folder: Path, *, overwrite: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Train one student into `folder` and return the folder of its model, in its family's own layout, without heads.

    A finished run of the same config, store and first weights is left as it is. Another finished run is replaced only
    with `overwrite` (see `start_of`). Samples that the stores lack are reported on stderr. `callbacks` are added to
    the Trainer's. Raises `FingerprintMismatch`, before any weight is opened, if a store is not what this config would
    have cached, and `TrainingStopped` after a signal.
    """
    dataset, _ = open_dataset(config)
    held_out = open_held_out(config, dataset)
    identity = RunIdentity.of(config, dataset, held_out)
    if is_finished(folder, identity):
        return folder / MODEL_FOLDER
    arguments = training_arguments(config, folder)
    check_together(arguments.world_size)
    with alone_in(folder) if is_first_process() else nullcontext():
        return _train(
            config, folder, (dataset, held_out), identity, arguments, overwrite=overwrite, callbacks=callbacks
        )


class AfterFirstStep(TrainerCallback):
    """Calls `begin` after each step: a training that fails in its first step leaves the folder as it was."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_step_end(self, args, state, control, **kwargs):
        self.begin()


def _train(
    config: Config,
    folder: Path,
    datasets: tuple[JoinedDataset, JoinedDataset | None],
    identity: RunIdentity,
    arguments: TrainingArguments,
    *,
    overwrite: bool,
    callbacks: Sequence[TrainerCallback],
) -> Path:
    if is_finished(folder, identity):  # by another process, before this one held the folder
        return folder / MODEL_FOLDER
    start = start_of(config, folder, identity, overwrite=overwrite)
    dataset, held_out = datasets
    trainer = build_trainer(
        config, folder, dataset, held_out=held_out, identity=identity, arguments=arguments
    )

    @once
    def begin() -> None:
        together = cast(PartialState, arguments.distributed_state)
        together.wait_for_everyone()  # every process has read the folder before one writes
        if is_first_process():
            _prepare_folder(folder, start)
            _save_origin(folder, config, dataset, held_out)
        together.wait_for_everyone()

    for callback in (AfterFirstStep(begin), *callbacks):
        trainer.add_callback(callback)
    # The Trainer prints its log; standard output is for results.
    with redirect_stdout(sys.stderr), trainer.stop, trainer.line:
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        begin()  # a training without steps has not called it yet
        _finish(trainer, folder)
    if trainer.is_world_process_zero():
        mark_finished(folder / FINISHED, config=config, **identity.to_json())
    trainer.accelerator.wait_for_everyone()
    if trainer.stop.is_asked:
        raise TrainingStopped(
            f"{folder}: trained to its end before {trainer.stop} stopped the rest; run the same command for what "
            "follows",
            trainer.stop.exit_code,
        )
    return folder / MODEL_FOLDER


def _prepare_folder(folder: Path, start: Start) -> None:
    """Remove what the training replaces, and the mark of a finished one, so that it is absent while training."""
    if start.replaces:
        print(f"{folder}: training anew, removed {', '.join(remove_training(folder))}", file=sys.stderr)
    (folder / FINISHED).unlink(missing_ok=True)


def _finish(trainer: DistillTrainer, folder: Path) -> None:
    """Write the trained student. Raises `TrainingStopped` if a signal ended the training before its end."""
    done, whole = trainer.state.global_step, trainer.state.max_steps
    if done < whole:
        raise TrainingStopped(
            f"{folder}: stopped by {trainer.stop} after step {done} of {whole}, checkpoint-{done} is written; run "
            f"the same command with {RESUME} to resume",
            trainer.stop.exit_code,
        )
    with writing(folder / MODEL_FOLDER):
        trainer.save_student(folder / MODEL_FOLDER)
    if trainer.is_world_process_zero():
        with writing(folder / STATE_FILE):
            trainer.state.save_to_json(str(folder / STATE_FILE))


def _save_origin(
    folder: Path, config: Config, dataset: JoinedDataset, held_out: JoinedDataset | None
) -> None:
    stores = dataset.stores
    of_held_out = {} if held_out is None else {"held_out_missing": [asdict(one) for one in held_out.missing]}
    save_provenance(
        folder,
        config,
        stores=stores.to_json(),
        allowed_mismatches=[asdict(difference) | {"store": path} for path, difference in stores.allowed],
        missing=[asdict(missing) for missing in dataset.missing],
        **of_held_out,
    )


def build_trainer(
    config: Config,
    folder: Path,
    dataset: JoinedDataset,
    *,
    identity: RunIdentity,
    arguments: TrainingArguments | None = None,
    held_out: JoinedDataset | None = None,
) -> DistillTrainer:
    """Build student, heads, optimizer and data from the seed: runs that differ only in losses have one data order.

    The losses of `held_out` are logged by `train.eval_strategy`. `identity` is written into the run's checkpoints.
    """
    arguments = arguments or training_arguments(config, folder)
    with building(
        f"student.model {config.student.model}", then="correct the `student` section, or train.seed"
    ):
        set_seed(arguments.seed)
        student = load_student(config, *dataset.stores.opened)
    distiller = build_distiller(config, student, dataset, held_out=held_out, device=arguments.device)
    with building("train: the trainer cannot be built", then=CORRECT_TRAIN):
        return DistillTrainer(
            model=distiller,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=JoinCollator(dataset.targets, dataset.preparation.image_token_id),
            settings=config,
            identity=identity,
        )


def training_arguments(config: Config, folder: Path) -> TrainingArguments:
    """Return the config's `train` section as transformers' arguments. Raises `ConfigError` for what it refuses."""
    given = {name: value for name, value in config.train.items() if name != "resume_from_checkpoint"}
    ours: dict[str, Any] = {
        "remove_unused_columns": False,
        "greater_is_better": False,  # transformers takes more of a loss for better, unless its name ends in "loss"
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Without a device accelerate connects processes only if asked for CPUs; otherwise each would train alone.
        "use_cpu": num_processes() > 1 and not torch.accelerator.is_available(),
    }
    with building("train: transformers refuses these arguments", then=CORRECT_TRAIN):
        arguments = TrainingArguments(output_dir=str(folder), **ours | given)
        if "tensorboard" in (arguments.report_to or ()):
            with needing("tensorboard", by="train.report_to: tensorboard", otherwise="set it to none"):
                import tensorboard  # noqa: F401
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # raises now, not after the weights are loaded, if it is not installed
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ConfigError(f"{NO_FLOAT16}, and there is no GPU here; set train.bf16, or neither")
    return one_device_a_process(arguments)
