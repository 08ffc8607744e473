"""Stores that each hold a part of what the small experiment's one store holds, and a config that mixes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from small_experiment import Experiment, losses_of_steps

from cache import Store, slice_store
from pipeline.config.config import Config
from pipeline.distill.student import train_student
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.upkeep.slices import manifest_with


def part_of_store(
    source: Path, target: Path, targets: Sequence[str], parts: Sequence[str] | None = None
) -> Path:
    """A store of some targets and parts of another, copied file by file."""
    opened = Store(source)
    slice_store(opened, target, manifest=manifest_with(opened, targets), parts=parts)
    return target


def mixing(
    experiment: Experiment, output: Path, *caches: Path | tuple[Path, Sequence[str]], more: Sequence[str] = ()
) -> Config:
    """The experiment's config with these stores; a pair also names the targets that are taken."""
    entries = [
        {"path": str(cache)}
        if isinstance(cache, Path)
        else {"path": str(cache[0]), "targets": list(cache[1])}
        for cache in caches
    ]
    return experiment.config(output, "cache=null", f"caches={json.dumps(entries)}", *more)


def losses_of(config: Config, folder: Path) -> list[dict[str, float]]:
    """Train; return the loss terms of every logged step."""
    train_student(config, folder)
    return losses_of_steps(folder)


def another_teacher(
    experiment: Experiment, folder: Path, tiny_model: Callable[..., MobileVLMForCausalLM]
) -> Path:
    """A wider teacher of other weights and more heads, of the same family."""
    tiny_model(
        seed=7, vocab_size=512, hidden_size=48, num_attention_heads=6, num_key_value_heads=6
    ).save_pretrained(folder)
    shutil.copy(experiment.teacher / "tokenizer.model", folder)
    return folder
