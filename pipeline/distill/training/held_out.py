"""Held-out losses: those of the training, on samples that it never sees, between two of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from pipeline.distill.join.dataset import Refused
from pipeline.distill.join.memory import TensorCache
from pipeline.distill.join.rank_batches import RankBatches
from pipeline.distill.model.loss_module import LossModule
from pipeline.distill.training.interruption import leave_signals_to_the_parent
from pipeline.distill.training.resuming import CORRECT_TRAIN, ResumingTrainer
from pipeline.distill.training.term_log import TermLog
from pipeline.errors import building


class HeldOutTrainer(ResumingTrainer):
    """A Trainer that logs `eval_loss`, and `eval_x` for each loss x, at the steps of `train.eval_strategy`.

    Each is a sum over all held-out samples, divided once by its count over all of them. So it does not depend on how
    they are cut into batches and processes.
    """

    @building("train: the held-out samples cannot be loaded", then=CORRECT_TRAIN)
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of this process: its part of the held-out samples, in the order of the store."""
        arguments, dataset = self.args, cast(Any, self.eval_dataset if eval_dataset is None else eval_dataset)
        batches = RankBatches(
            len(dataset),
            arguments.per_device_eval_batch_size,
            arguments.world_size,
            arguments.process_index,
            is_shuffled=False,
        )
        return DataLoader(
            dataset,
            batch_sampler=cast(Any, batches),
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # the loader would else draw a number from the training's
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the held-out losses of all processes as metrics. All processes must call it."""
        cast(Any, self.callback_handler).eval_dataloader = dataloader  # a progress bar asks for its length
        log, nothing = TermLog(), torch.zeros(())
        with _as_it_is(self.distiller), torch.no_grad():
            for batch in dataloader:
                Refused.check(batch)
                terms = cast(Any, self.model)(send_to_device(batch, self.args.device))
                log.add(None if batch["is_filler"] else terms, nothing)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        of_all = TermLog.of(self.log_names, self.sum_of_ranks(log.sums(self.log_names)))
        means = of_all.means(self.losses)
        metrics = {f"{metric_key_prefix}_loss": sum(means[f"loss/{name}_weighted"] for name in self.losses)}
        metrics |= {f"{metric_key_prefix}_{name}": means[f"loss/{name}"] for name in self.losses}
        metrics |= {f"{metric_key_prefix}_{name}": of_all.mean(name) for name in self.distiller.observed}
        num_samples = len(cast(Any, dataloader.dataset))
        return EvalLoopOutput(
            predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=num_samples
        )


@contextmanager
def _as_it_is(distiller: LossModule) -> Iterator[None]:
    """Leave the training as it was found: no dropout meanwhile, and none of its images put out of memory.

    Features that are computed again, in another batch, may be rounded otherwise.
    """
    was_training, held = distiller.training, distiller.patch_feature_cache
    distiller.eval()
    distiller.patch_feature_cache = TensorCache(0)
    try:
        yield
    finally:
        distiller.train(was_training)
        distiller.patch_feature_cache = held
