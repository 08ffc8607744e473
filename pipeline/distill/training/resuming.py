"""A Trainer that goes on at the very sample where a checkpoint stopped, also with another global batch."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.training_args import OptimizerNames

from pipeline.config.config import Config
from pipeline.config.provenance import read_mark
from pipeline.distill.join.rank_batches import RankBatches
from pipeline.distill.training.data_position import DataPosition
from pipeline.distill.training.interruption import leave_signals_to_the_parent
from pipeline.errors import building

# Of a checkpoint: the run that it can continue, when that began, its place in the data, and what is not logged yet.
RUN_FILE = "run.json"


CORRECT_TRAIN = "correct the `train` section"


class ResumingTrainer(Trainer):
    """transformers.Trainer whose place in the data is kept in samples, not worked out from steps.

    The Trainer works out epoch and batch from the number of steps, which holds while all steps are alike. Here they
    come from the checkpoint's `DataPosition`. `global_step` counts the steps that were made, whatever their length.
    """

    def __init__(self, *, settings: Config, **kwargs: Any):
        super().__init__(**kwargs)
        self.settings = settings
        self.position = DataPosition(self._samples_per_step())
        self.resumed_from: DataPosition | None = None
        self.began = time.time()
        self.schedule_ahead = 0

    def train(self, resume_from_checkpoint: str | None = None, **named: Any):  # type: ignore[override]
        """As `Trainer.train`; from a checkpoint's folder at the sample where it stopped."""
        if resume_from_checkpoint is not None:
            run = read_mark(Path(resume_from_checkpoint) / RUN_FILE)
            self.resumed_from, self.began = DataPosition(**run["position"]), run["began"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **named)

    @building("train: the samples cannot be loaded", then=CORRECT_TRAIN)
    def get_train_dataloader(self) -> DataLoader:
        """Samples in the seed's order, the same for any number of processes, from where the run is on."""
        arguments = self.args
        self.batches = RankBatches(
            len(cast(Any, self.train_dataset)),
            self._train_batch_size,
            arguments.world_size,
            arguments.process_index,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            drop_last=arguments.dataloader_drop_last,
            block=self.settings.data.shuffle_block,
        )
        start = self.resumed_from or DataPosition(self._samples_per_step())
        self.position = start.in_steps_of(self._samples_per_step(), self.batches.samples_an_epoch)
        self.batches.first_epoch, self.batches.first_sample = self.position.epoch, self.position.sample
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=cast(Any, self.batches),
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_the_parent,
        )
        # Cut by rank already; accelerate would fill the end of an epoch with samples of its beginning.
        return prepare_data_loader(
            loader, arguments.device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step; the position is from now on where that step ends."""
        self.position = self.position.after_step(self.batches.samples_an_epoch)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def set_initial_training_values(self, args, dataloader):
        """How long the run is: `max_steps` counts steps, of any length; epochs end with their last sample."""
        values = super().set_initial_training_values(args, dataloader)
        self.schedule_ahead = 0
        if self.resumed_from is None:
            return values
        epochs, steps_an_epoch, examples, samples, batch, batches_an_epoch, steps = values
        # Steps that were made beyond those that steps of this length would have needed up to here; may be negative.
        here = self.position.epoch * steps_an_epoch + self.position.steps_into_epoch
        ahead = self.position.step - here
        if args.max_steps > 0:
            epochs = math.ceil((steps - ahead) / steps_an_epoch)
        else:
            self.schedule_ahead = ahead
            samples, steps = samples * (steps + ahead) / steps, steps + ahead
        if self.position.step >= steps:  # the Trainer would make one step more
            epochs = self.position.epoch
        return epochs, steps_an_epoch, examples, samples, batch, batches_an_epoch, steps

    def _init_training_state(self, *arguments, **named) -> tuple[int, int]:
        epoch_and_batches = super()._init_training_state(*arguments, **named)
        if self.resumed_from is None:
            return epoch_and_batches
        if self._is_cut_otherwise():
            self._tell_of_other_steps(self.resumed_from.samples_per_step)
        return self.position.epoch, self.position.steps_into_epoch * self.args.gradient_accumulation_steps

    def _is_cut_otherwise(self) -> bool:
        before = self.resumed_from
        return before is not None and before.samples_per_step != self.position.samples_per_step

    def _tell_of_other_steps(self, before: int) -> None:
        """On stderr, and in the log that the result keeps."""
        now = self.position
        line: dict[str, Any] = {"samples_per_step": now.samples_per_step, "samples_per_step_before": before}
        self.state.log_history.append(line | {"epoch": self.state.epoch, "step": now.step})
        if self.is_world_process_zero():
            print(
                f"{self.args.output_dir}/checkpoint-{now.step} was made with {before} samples a step; going on with "
                f"{now.samples_per_step}, after {now.sample} of {self.batches.samples_an_epoch} samples of epoch "
                f"{now.epoch + 1}",
                file=sys.stderr,
            )

    def _prepare_for_training(self, *arguments, **named):
        with building("train: the trainer cannot be built", then=CORRECT_TRAIN):
            return super()._prepare_for_training(*arguments, **named)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None):
        """Over epochs the learning rate is that of a run whose steps were all of today's length."""
        return super().create_scheduler(num_training_steps - self.schedule_ahead, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_fsdp_enabled and not self.keeps_sharded_state:
            self._load_schedule(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if self._is_cut_otherwise() and self.args.max_steps <= 0 and isinstance(schedule, LambdaLR):
            schedule.last_epoch = self.position.step - self.schedule_ahead - 1
            schedule.step()  # to the step that the run is at; sets the optimizer's rates, too

    @property
    def keeps_sharded_state(self) -> bool:
        """Whether the optimizer is sharded and has a state: plain SGD has none."""
        return self.is_fsdp_enabled and self.args.optim != OptimizerNames.SGD

    def _load_schedule(self, checkpoint: Path) -> None:
        """All there is to load with plain SGD, whose optimizer has no state.

        torch finds the device for a sharded optimizer's state by its tensors, and fails where there are none.
        """
        schedule = cast(LambdaLR, self.lr_scheduler)
        schedule.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _samples_per_step(self) -> int:
        """Over all ranks and accumulations."""
        arguments = self.args
        return self._train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
