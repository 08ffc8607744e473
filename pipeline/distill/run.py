"""A training in its folder: begun, resumed or found finished, and marked when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache as once
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pipeline.config.config import Config
from pipeline.config.provenance import mark_finished, save_provenance
from pipeline.config.training_arguments import NO_FLOAT16
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.model.loss_module import LossModule
from pipeline.distill.training.processes import alone_in, check_together, is_first_process, num_processes
from pipeline.distill.training.resuming import CORRECT_TRAIN, one_device_a_process
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.trained import Trained
from pipeline.distill.training.trainer import DistillTrainer
from pipeline.distill.training.training_folder import (
    FINISHED,
    RESUME,
    STATE_FILE,
    Product,
    Start,
    is_finished,
    remove_training,
    start_of,
)
from pipeline.errors import ConfigError, TrainingStopped, building, needing, writing


@dataclass(frozen=True)
class Job:
    """A training: its samples, all that its weights depend on, what is trained, and how that is built.

    `build` returns the module for these arguments; it draws from torch's random generator after seeding it.
    """

    config: Config
    dataset: JoinedDataset
    held_out: JoinedDataset | None
    identity: RunIdentity
    trained: Trained
    build: Callable[[TrainingArguments], LossModule]

    def trainer(self, arguments: TrainingArguments) -> DistillTrainer:
        """Build the module, its optimizer and its data."""
        module = self.build(arguments)
        with building("train: the trainer cannot be built", then=CORRECT_TRAIN):
            return DistillTrainer(
                model=module,
                args=arguments,
                train_dataset=self.dataset,
                eval_dataset=self.held_out,
                data_collator=JoinCollator(self.dataset.targets, self.dataset.preparation.image_token_id),
                settings=self.config,
                identity=self.identity,
                trained=self.trained,
            )


def train(
    job: Job, folder: Path, *, overwrite: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Train into `folder` and return the folder of what was trained.

    A finished run of the same identity is left as it is. Another one is replaced only with `overwrite` (see
    `start_of`). `callbacks` are added to the Trainer's. Raises `TrainingStopped` after a signal.
    """
    product = job.trained.product
    if is_finished(folder, job.identity, product):
        return folder / product.folder
    arguments = training_arguments(job.config, folder)
    check_together(arguments.world_size)
    with alone_in(folder) if is_first_process() else nullcontext():
        if not is_finished(
            folder, job.identity, product
        ):  # by another process, before this one held the folder
            _train(job, folder, arguments, overwrite=overwrite, callbacks=callbacks)
    return folder / product.folder


class AfterFirstStep(TrainerCallback):
    """Calls `begin` after each step: a training that fails in its first step leaves the folder as it was."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_step_end(self, args, state, control, **kwargs):
        self.begin()


def _train(
    job: Job,
    folder: Path,
    arguments: TrainingArguments,
    *,
    overwrite: bool,
    callbacks: Sequence[TrainerCallback],
) -> None:
    product = job.trained.product
    start = start_of(job.config, folder, job.identity, overwrite=overwrite, product=product)
    trainer = job.trainer(arguments)

    @once
    def begin() -> None:
        together = cast(PartialState, arguments.distributed_state)
        together.wait_for_everyone()  # every process has read the folder before one writes
        if is_first_process():
            _prepare_folder(folder, start, product)
            _save_origin(folder, job)
        together.wait_for_everyone()

    for callback in (AfterFirstStep(begin), *callbacks):
        trainer.add_callback(callback)
    # The Trainer prints its log; standard output is for results.
    with redirect_stdout(sys.stderr), trainer.stop, trainer.line:
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        begin()  # a training without steps has not called it yet
        _finish(trainer, folder)
    if trainer.is_world_process_zero():
        mark_finished(folder / FINISHED, config=job.config, **job.identity.to_json())
    trainer.accelerator.wait_for_everyone()
    if trainer.stop.is_asked:
        raise TrainingStopped(
            f"{folder}: trained to its end before {trainer.stop} stopped the rest; run the same command for what "
            "follows",
            trainer.stop.exit_code,
        )


def _prepare_folder(folder: Path, start: Start, product: Product) -> None:
    """Remove what the training replaces, and the mark of a finished one, so that it is absent while training."""
    if start.replaces:
        print(
            f"{folder}: training anew, removed {', '.join(remove_training(folder, product))}", file=sys.stderr
        )
    (folder / FINISHED).unlink(missing_ok=True)


def _finish(trainer: DistillTrainer, folder: Path) -> None:
    """Write what was trained. Raises `TrainingStopped` if a signal ended the training before its end."""
    done, whole = trainer.state.global_step, trainer.state.max_steps
    if done < whole and trainer.stop.ends(trainer.args.world_size):  # else it stopped early
        raise TrainingStopped(
            f"{folder}: stopped by {trainer.stop} after step {done} of {whole}, checkpoint-{done} is written; run "
            f"the same command with {RESUME} to resume",
            trainer.stop.exit_code,
        )
    place = folder / trainer.trained.product.folder
    with writing(place):
        trainer.save_trained(place)
    if trainer.is_world_process_zero():
        with writing(folder / STATE_FILE):
            trainer.state.save_to_json(str(folder / STATE_FILE))


def _save_origin(folder: Path, job: Job) -> None:
    stores, held_out = job.dataset.stores, job.held_out
    of_held_out = {} if held_out is None else {"held_out_missing": [asdict(one) for one in held_out.missing]}
    save_provenance(
        folder,
        job.config,
        stores=stores.to_json(),
        allowed_mismatches=[asdict(difference) | {"store": path} for path, difference in stores.allowed],
        missing=[asdict(missing) for missing in job.dataset.missing],
        **of_held_out,
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
