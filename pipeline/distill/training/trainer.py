"""The Trainer of stage 2: one loss of several terms, each divided by its count over the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from pipeline.config.config import Config
from pipeline.distill.join.dataset import Refused
from pipeline.distill.join.rank_batches import RankBatches
from pipeline.distill.model.loss_module import Terms
from pipeline.distill.training.held_out import HeldOutTrainer
from pipeline.distill.training.interruption import StopOnSignal, leave_signals_to_the_parent
from pipeline.distill.training.resuming import CORRECT_TRAIN
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.term_log import TermLog, gradient_shares
from pipeline.distill.training.trained import Trained
from pipeline.distill.training.training_line import TrainingLine
from pipeline.errors import ConfigError, PipelineError, building
from pipeline.losses.losses import LOSSES
from pipeline.positions import Counts


class NonFiniteLossError(PipelineError):
    """A loss term became NaN or infinite; training stops before the optimizer sees it."""


class LeaveImagesOut(TrainerCallback):
    """Keeps a step of several processes without any image from changing parameters that only images train.

    In one process they have no gradient in such a step. In several they have one of zero, by which the momentum and
    the decay of an optimizer would change them.
    """

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, optimizer: Any = None, **kwargs):
        if self.trainer.has_images:
            return
        for parameter in self.trainer.distiller.of_images():
            # torch loads no sharded optimizer that lacks a parameter's state, so there the first step counts.
            if not self.trainer.keeps_sharded_state or parameter in optimizer.state:
                parameter.grad = None


class DistillTrainer(HeldOutTrainer):
    """A Trainer whose loss is the weighted sum of terms, each divided by its count over the whole step."""

    def __init__(
        self, *, settings: Config, identity: RunIdentity, trained: Trained | None = None, **kwargs: Any
    ):
        super().__init__(settings=settings, identity=identity, trained=trained, **kwargs)
        if settings.log_gradient_shares and self.is_fsdp_enabled:
            raise ConfigError(
                "log_gradient_shares needs whole gradients, but FSDP cuts them up; set it to false"
            )
        self.gradient_shares: dict[str, float] = {}
        self.has_images = True  # the current step, in any process
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.add_callback(LeaveImagesOut(self))
        self.line = TrainingLine(self)
        self.add_callback(self.line)
        # `get_batch_samples` returns counts over the whole optimizer step, so no further division is due.
        self.model_accepts_loss_kwargs = True

    @building("train: the samples cannot be loaded", then=CORRECT_TRAIN)
    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process: its part of every batch, in the order of `RankBatches`."""
        arguments = self.args
        batches = RankBatches(
            len(cast(Any, self.train_dataset)),
            self._train_batch_size,  # the arguments' own, unless `auto_find_batch_size` made it smaller
            arguments.world_size,
            arguments.process_index,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            drop_last=arguments.dataloader_drop_last,
            accumulation=arguments.gradient_accumulation_steps,
            block=self.settings.data.shuffle_block,
        )
        if not len(batches):
            raise ConfigError(
                f"train.dataloader_drop_last leaves no step: {batches.num_samples} samples are fewer than the "
                f"{self.get_total_train_batch_size(arguments)} of a step (batch size x accumulation x processes); "
                "set it to false, or make the step smaller"
            )
        loader = DataLoader(
            cast(Any, self.train_dataset),
            batch_sampler=cast(Any, batches),
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
        """Return the micro-batches of one optimizer step, and each term's count over them and all processes."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed when all steps were made: the Trainer would make one more
        self.distiller.progress = self.state.global_step / self.state.max_steps
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            Refused.check(batch)
        counts = torch.tensor([count_terms(batch, self.losses) for batch in batches], dtype=torch.float32)
        # In the same exchange: whether to stop after this step, as all processes must do at once, and whether
        # any of them has images.
        shown = any(batch["images"] and not batch["is_filler"] for batch in batches)
        mine = torch.cat([counts.sum(dim=0), torch.tensor([float(self.stop.is_asked), float(shown)])])
        *summed, num_asked, num_shown = self.accelerator.reduce(mine.to(device), reduction="sum")
        if self.args.world_size > 1:
            self.stop.is_agreed, self.has_images = bool(num_asked > 0), bool(num_shown > 0)
        return batches, dict(zip(self.losses, summed, strict=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Any = None):
        """Return the weighted sum of the terms, each total divided by its count over the whole step.

        Raises `NonFiniteLossError` if a term is not finite.
        """
        result: Terms = model(inputs)
        weighted: dict[str, torch.Tensor] = {}
        for name in self.losses:
            total, count = result[name]
            if not torch.isfinite(total):
                raise NonFiniteLossError(
                    f"losses.{name} became {total.item()} at step {self.state.global_step}; the weights of the last "
                    "checkpoint are sound: lower train.learning_rate, or check the store with `alignkd verify --deep`"
                )
            divisor = count if num_items_in_batch is None else num_items_in_batch[name]
            weight = 0.0 if inputs["is_filler"] else self.losses[name].weight
            weighted[name] = weight * total / divisor.clamp(min=1)
        # The Trainer logs steps by `logging_steps`; steps that other strategies log have no shares.
        is_logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        if self.settings.log_gradient_shares and self.accelerator.sync_gradients and is_logged:
            of_all = self.sum_over_ranks if self.args.world_size > 1 else None
            self.gradient_shares = gradient_shares(weighted, self.trained.of(self.distiller), of_all=of_all)
        loss = torch.stack(list(weighted.values())).sum()
        self.term_log.add(None if inputs["is_filler"] else result, loss)
        # DDP and FSDP average gradients over processes. The counts are those of all processes together, so the
        # gradients must be summed: the product undoes the average.
        loss = loss * self.accelerator.num_processes
        return (loss, result) if return_outputs else loss

    def create_optimizer(self, model=None):
        """Make the optimizer, in groups by learning rate and decay; every trained parameter is in one."""
        if self.optimizer is None:
            with building("train: the optimizer cannot be made", then=CORRECT_TRAIN):
                options_class, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, self.model))
                self.optimizer = options_class(self._parameter_groups(), **options)
        grouped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        left_out = [
            name for name, p in self.distiller.named_parameters() if p.requires_grad and id(p) not in grouped
        ]
        assert not left_out, f"parameters in no optimizer group: {left_out}"
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(self.distiller))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.distiller.named_parameters():
            if parameter.requires_grad:
                rate = self.trained.learning_rate(self.distiller, name)
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((rate or self.args.learning_rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term, raw and weighted, to a line of losses; `samples_seen` to the last line.

        The Trainer's own loss and throughput leave out what was done before a resume.
        """
        if "train_runtime" in logs:
            # The short last step of an epoch counts as a full one.
            logs["samples_seen"] = self.state.global_step * self.get_total_train_batch_size(self.args)
        if "loss" in logs:
            of_all = TermLog.of(self.log_names, self.sum_of_ranks(self.term_log.sums(self.log_names)))
            num_steps = self.state.global_step - self.last_logged_step
            logs["loss"] = float(of_all.loss) / num_steps
            logs |= of_all.means(self.losses) | self.gradient_shares
            logs |= {name: of_all.mean(name) for name in self.distiller.observed}
            self.term_log, self.gradient_shares = TermLog(), {}
            self.last_logged_step = self.state.global_step
        super().log(logs, start_time)


def count_terms(batch: Mapping[str, Any], losses: Mapping[str, Any]) -> list[int]:
    """Return what each loss counts in a batch, before the forward (see `Loss.count`); nothing in a filler."""
    if batch["is_filler"]:
        return [0] * len(losses)
    counts = Counts.of(batch)
    return [int(LOSSES[name].count(settings, counts)) for name, settings in losses.items()]
