"""A step of stage 2 from the store against plain fine-tuning and against a teacher in the same process, side by side.

python -m bench.stage2 --size small --tokens 300
python -m bench.stage2 --size wide --samples 8 --batch-size 4 --only labels,plain,cached   (two CPU cores, 20 GB)
python -m bench.stage2 --size full --tokens 300      (a GPU with 80 GB, about 8 minutes)
python -m bench.stage2 --profiled cached             (where a turn of one contestant goes, by torch's profiler)

`labels`   the student on labels alone, by the same code: the head runs where answers are
`plain`    the student's own forward with `labels`, as any Trainer would call it: logits of every position
`cached`   every loss, targets from batches that are in memory: what a step costs
`loading`  the same, batches by two workers from shards and store: what waiting adds
`online`   a step of `cached` after the teacher's own forward of the batch
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch

from bench.models import Case, config_of, write_inputs
from bench.turns import Work, stage_app
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.join.stores import open_stores
from pipeline.distill.parts import needed_targets
from pipeline.distill.student import build_trainer
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.models.stub import load_teacher
from pipeline.teacher_cache.teacher import cache_teacher, plan_capture

LABELS = {"supervised": {}}
ALL = {**LABELS, "attention": {}, "vision_all": {}, "vision_focus": {"k": 16}, "logits": {"weight": 0.1}}


def prepare(case: Case) -> None:
    """Write models, a shard, and its store."""
    write_inputs(case, "teacher", "student")
    cache_teacher(config_of(case, ALL))


def _trainer(case: Case, losses: Mapping[str, Any]) -> Any:
    """The Trainer of stage 2 with its optimizer and its data set."""
    config = config_of(case, losses)
    preparation = load_preparation(config.student.model, config.data)
    stores = open_stores(config, preparation)
    dataset = JoinedDataset(stores, config.data.shards, preparation, targets=needed_targets(config))
    trainer = build_trainer(
        config, case.folder / "out", dataset, identity=RunIdentity("bench", {}, samples_per_step=1)
    )
    trainer.model.to(trainer.args.device).train()
    trainer.create_optimizer()
    return trainer


def _over(trainer: Any, loss_of: Callable[[Any], Any]) -> Work:
    """A step with each batch of the data set; the batches are in memory, on the device."""
    batches = list(trainer.get_train_dataloader())

    def turn() -> Mapping[str, float]:
        for batch in batches:
            _step(trainer, loss_of(batch))
        return {}

    return turn


def _step(trainer: Any, loss: Any) -> None:
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def cached(case: Case, *, losses: Mapping[str, Any] = ALL) -> Work:
    """Steps of our own loss."""
    trainer = _trainer(case, losses)
    return _over(trainer, lambda batch: trainer.compute_loss(trainer.model, batch))


def plain(case: Case) -> Work:
    """Steps of the cross entropy of every position's logits, as the model's own forward gives them."""
    trainer = _trainer(case, LABELS)
    student = trainer.distiller.student

    def loss_of(batch: Any) -> Any:
        pixels = torch.cat([image["pixel_values"] for image in batch["images"]])
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        return student(ids, mask, labels, pixels).loss

    return _over(trainer, loss_of)


def loading(case: Case) -> Work:
    """Steps whose batches come from the loader's workers; counts the share of the time spent waiting for them."""
    trainer = _trainer(case, ALL)
    trainer.args.dataloader_num_workers = case.workers
    trainer.args.dataloader_persistent_workers = case.workers > 0
    batches = chain.from_iterable(repeat(trainer.get_train_dataloader()))
    next(batches)  # the workers have started

    def turn() -> Mapping[str, float]:
        started, waited = time.perf_counter(), 0.0
        for _ in range(case.samples // case.batch_size):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            _step(trainer, trainer.compute_loss(trainer.model, batch))
        return {"waiting": waited / (time.perf_counter() - started)}

    return turn


def online(case: Case) -> Work:
    """Steps of `cached`, the whole teacher's forward before each."""
    trainer, plan = _trainer(case, ALL), plan_capture(config_of(case, ALL))
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=trainer.args.device)

    def loss_of(batch: Any) -> Any:
        sizes = [size for of_sample in batch["sizes"] for size in of_sample]
        teacher.forward(batch, teacher.encode_images(batch["images"], sizes))
        return trainer.compute_loss(trainer.model, batch)

    return _over(trainer, loss_of)


CONTESTANTS = {
    "labels": partial(cached, losses=LABELS),
    "plain": plain,
    "cached": cached,
    "loading": loading,
    "online": online,
}
app = stage_app(__doc__.splitlines()[0], CONTESTANTS, prepare)

if __name__ == "__main__":
    app()
