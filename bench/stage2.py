"""A step of stage 2 from the store against plain fine-tuning and against a teacher in the same process, side by side.

python bench/stage2.py --size small --tokens 300
python bench/stage2.py --size wide --samples 8 --batch_size 4 --only labels,plain,cached   (two CPU cores, 20 GB)
python bench/stage2.py --size full --tokens 300      (a GPU with 80 GB, about 8 minutes)
python bench/stage2.py --profile cached              (where a turn of one contestant goes, by torch's profiler)

`labels`   the student on labels alone, by the same code: the head runs where answers are
`plain`    the student's own forward with `labels`, as any Trainer would call it: logits of every position
`cached`   every loss, targets from batches that are in memory: what a step costs
`loading`  the same, batches by two workers from shards and store: what waiting adds
`online`   a step of `cached` after the teacher's own forward of the batch, which stands beside the student
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import Work
from stage_bench import Bench

TARGETS = {"attention": {"layers": [0]}, "vision": {}, "logits": {"top_k": 32}}
LABELS = {"supervised": {}}
ALL = {**LABELS, "attention": {}, "vision_all": {}, "vision_focus": {"k": 16}, "logits": {"weight": 0.1}}


def prepare(options: argparse.Namespace) -> None:
    """Models, a shard, and its store."""
    from random_models import write_model, write_shard

    from pipeline.teacher_cache.teacher import cache_teacher

    folder = Path(options.folder)
    for role in ("teacher", "student"):
        if not (folder / role).exists():
            write_model(folder / role, options.size, role)
    if not (folder / "data").exists():
        write_shard(folder / "data", samples=options.samples, tokens=options.tokens)
    cache_teacher(_config(options, ALL))


def _config(options: argparse.Namespace, losses: Mapping[str, Any]) -> Any:
    from random_models import compute_dtype

    from pipeline.config.config import Config

    folder, dtype = Path(options.folder), compute_dtype(options.size)
    return Config.model_validate({
        "output_dir": str(folder / "out"),
        "teacher": {"model": str(folder / "teacher"), "batch_size": options.batch_size, "dtype": dtype},
        "student": {"model": str(folder / "student"), "dtype": "float32" if dtype == "float32" else "bfloat16"},
        "data": {"shards": str(folder / "data" / "shards")},
        "cache": {"path": str(folder / "store")},
        "targets": TARGETS,
        "losses": losses,
        "train": {"per_device_train_batch_size": options.batch_size, "report_to": "none", "max_steps": 1},
    })  # fmt: skip


def _trainer(options: argparse.Namespace, losses: Mapping[str, Any]) -> Any:
    """The Trainer of stage 2, its optimizer made, and its data set."""
    from pipeline.data.preparation import Preparation
    from pipeline.distill.join.dataset import JoinedDataset
    from pipeline.distill.join.stores import open_stores
    from pipeline.distill.student import build_trainer, needed_targets
    from pipeline.distill.training.run_identity import RunIdentity

    config = _config(options, losses)
    preparation = Preparation.of(config.student.model, config.data)
    stores = open_stores(config, preparation)
    dataset = JoinedDataset(stores, config.data.shards, preparation, targets=needed_targets(config))
    trainer = build_trainer(config, Path(options.folder) / "out", dataset, identity=RunIdentity("bench", {}))
    trainer.model.to(trainer.args.device).train()
    trainer.create_optimizer()
    return trainer


def _collated(trainer: Any, size: int) -> list[Any]:
    """The data set's batches, in memory, on the device."""
    dataset = trainer.train_dataset
    samples = [dataset[number] for number in range(len(dataset))]
    return [
        trainer._prepare_inputs(trainer.data_collator(samples[start : start + size]))
        for start in range(0, len(samples), size)
    ]


def _step(trainer: Any, batch: Any) -> None:
    trainer.compute_loss(trainer.model, batch).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _from_store(losses: Mapping[str, Any]) -> Callable[[argparse.Namespace], Work]:
    def prepare(options: argparse.Namespace) -> Work:
        trainer = _trainer(options, losses)
        batches = _collated(trainer, options.batch_size)

        def turn() -> Mapping[str, float]:
            for batch in batches:
                _step(trainer, batch)
            return {"samples": options.samples}

        return turn

    return prepare


def _plain(options: argparse.Namespace) -> Work:
    """Cross entropy of the logits of every position, as the model's own forward gives them."""
    from torch.nn.functional import cross_entropy

    from pipeline.positions import IGNORE_INDEX

    trainer = _trainer(options, LABELS)
    batches, student = _collated(trainer, options.batch_size), trainer.distiller.student

    def turn() -> Mapping[str, float]:
        for batch in batches:
            vision = student.encode_images(batch["pixel_values"])
            merged = student.merge_inputs(
                batch["input_ids"], vision, attention_mask=batch["attention_mask"], labels=batch["labels"]
            )
            mask = merged.attention_mask.long()
            hidden = student.model(inputs_embeds=merged.inputs_embeds, attention_mask=mask, use_cache=False)
            logits = student.lm_head(hidden.last_hidden_state)[:, :-1].float()
            labels = merged.labels[:, 1:]
            cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        return {"samples": options.samples}

    return turn


def _loading(options: argparse.Namespace) -> Work:
    from torch.utils.data import DataLoader

    trainer = _trainer(options, ALL)
    loader: Any = DataLoader(
        trainer.train_dataset,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        collate_fn=trainer.data_collator,
        persistent_workers=options.workers > 0,
    )
    batches = _for_ever(loader)
    next(batches)  # the workers have started

    def turn() -> Mapping[str, float]:
        started, waited = time.perf_counter(), 0.0
        for _ in range(options.samples // options.batch_size):
            asked = time.perf_counter()
            batch = trainer._prepare_inputs(next(batches))
            waited += time.perf_counter() - asked
            _step(trainer, batch)
        return {"samples": options.samples, "waiting": waited / (time.perf_counter() - started)}

    return turn


def _for_ever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _online(options: argparse.Namespace) -> Work:
    from pipeline.models.stub import load_teacher
    from pipeline.teacher_cache.teacher import plan_capture

    trainer = _trainer(options, ALL)
    batches = _collated(trainer, options.batch_size)
    plan = plan_capture(_config(options, ALL))
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=trainer.args.device)

    def turn() -> Mapping[str, float]:
        for batch in batches:
            vision = teacher.encode_images(batch["pixel_values"].to(plan.dtype))
            teacher.forward(batch["input_ids"], batch["attention_mask"], batch["labels"], vision)
            _step(trainer, batch)
        return {"samples": options.samples}

    return turn


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Work]] = {
    "labels": _from_store(LABELS),
    "plain": _plain,
    "cached": _from_store(ALL),
    "loading": _loading,
    "online": _online,
}


if __name__ == "__main__":
    sys.exit(Bench(__file__, __doc__ or "", CONTESTANTS, against="labels", prepare=prepare).main())
