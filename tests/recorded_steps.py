"""`alignkd` that writes down the keys that every step is made of: one line of JSON a step and process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cli
from pipeline.distill.join.dataset import JoinCollator
from pipeline.distill.training.trainer import DistillTrainer

FOLDER = "RECORDED_STEPS"  # the environment's variable that names where to

_collate, _draw = JoinCollator.__call__, DistillTrainer.get_batch_samples


def collate_with_keys(collator, samples):
    """The batch, and the keys of those of its samples that count."""
    keys = [sample.key for sample in samples if not sample.is_filler]
    return _collate(collator, samples) | {"keys": keys}


def keys_of_step(batches) -> list[str]:
    return [key for batch in batches for key in batch["keys"]]


def _draw_and_write(trainer, *arguments):
    batches, counts = _draw(trainer, *arguments)
    file = Path(os.environ[FOLDER]) / f"{trainer.args.process_index}.jsonl"
    with file.open("a") as lines:
        lines.write(json.dumps(keys_of_step(batches)) + "\n")
    return batches, counts


if __name__ == "__main__":
    JoinCollator.__call__ = collate_with_keys
    DistillTrainer.get_batch_samples = _draw_and_write
    cli.main()
