"""`train:` of the config: what of TrainingArguments it takes, and what to write in place of the rest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, cast

from pipeline.config.yaml_text import yes_or_no
from pipeline.errors import did_you_mean

NOTHING_IS_SENT = (
    "nothing is sent anywhere from a training; send its finished folder `model` with `hf upload`"
)

# TrainingArguments that the config sets elsewhere, or that transformers 5 renamed, with what to write instead.
OURS: dict[str, str] = {
    "output_dir": "set the config's own `output_dir`; the student is written below it",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN: a config is written beside every result",
    "push_to_hub_token": "log in with `hf auth login`, or set HF_TOKEN: a config is written beside every result",
    "push_to_hub": NOTHING_IS_SENT,
    "push_to_hub_model_id": NOTHING_IS_SENT,
    "push_to_hub_organization": NOTHING_IS_SENT,
    "hub_model_id": NOTHING_IS_SENT,
    "hub_strategy": NOTHING_IS_SENT,
    "hub_private_repo": NOTHING_IS_SENT,
    "hub_always_push": NOTHING_IS_SENT,
    "hub_revision": NOTHING_IS_SENT,
    "remove_unused_columns": "it must be false for the join, and is",
    "gradient_checkpointing": "set `student.gradient_checkpointing`",
    "warmup_ratio": "transformers 5 takes `warmup_steps`; a value below 1 is a share of all steps",
    "eval_strategy": "the `evaluate` section measures the finished student; nothing is evaluated on the way",
    "evaluation_strategy": "the `evaluate` section measures the finished student; nothing is evaluated on the way",
    "train_sampling_strategy": "samples are drawn at random, so that runs to be compared see the same order",
    "group_by_length": "samples are drawn at random, so that runs to be compared see the same order",
    "label_smoothing_factor": "the terms of the loss are those of the `losses` section",
    "save_only_model": "a checkpoint without its optimizer could not be gone on from",
    "ignore_data_skip": "a resumed run goes on with the samples that it has not met, and reads no other",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
    "use_liger_kernel": "Liger's kernels were not tried with this student, whose head runs at answers alone",
    "neftune_noise_alpha": "noise in the embeddings would be no part of what the teacher saw",
}

NO_FLOAT16 = "train.fp16: a CPU does not train in float16"

# Of `train`: how a run is logged and saved, which changes no weight.
OF_THE_LOG = (
    "disable_tqdm",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)

# Of `train`: how the work is cut up and carried out, which changes no weight beyond rounding while the samples of a
# step stay: see `samples_per_step`.
HOW_IT_RUNS = (
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
)

AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps")

# TrainingArguments takes these as strings, and true and false beside them.
ALSO_BOOLEAN = ("fsdp", "resume_from_checkpoint")

# What people call a training argument, by its name here.
CALLED: dict[str, tuple[str, ...]] = {
    "adam_beta1": ("betas", "adam_betas", "beta1"),
    "bf16": ("amp", "mixed_precision", "precision"),
    "dataloader_num_workers": ("num_workers", "workers"),
    "gradient_accumulation_steps": (
        "accumulate_grad_batches", "accumulation_steps", "grad_accum", "grad_accumulation", "gradient_accumulation",
    ),
    "learning_rate": ("lr", "base_lr", "max_lr"),
    "logging_steps": ("log_every", "log_interval", "log_steps"),
    "lr_scheduler_type": ("lr_schedule", "lr_scheduler", "schedule", "scheduler"),
    "max_grad_norm": ("clip_grad_norm", "grad_clip", "gradient_clipping", "max_norm"),
    "max_steps": ("max_train_steps", "num_steps", "num_train_steps", "steps", "total_steps"),
    "num_train_epochs": ("epoch", "epochs", "max_epochs", "n_epochs", "num_epochs"),
    "optim": ("optimizer", "optimiser"),
    "output_dir": ("out", "output", "output_folder", "save_dir"),
    "per_device_train_batch_size": (
        "batch", "batch_size", "bs", "micro_batch_size", "per_gpu_train_batch_size", "train_batch_size",
    ),
    "save_steps": ("save_every", "save_interval"),
    "seed": ("random_seed",),
    "warmup_steps": ("num_warmup_steps", "warmup", "warmup_proportion"),
    "weight_decay": ("decay", "wd"),
}  # fmt: skip
MEANT = {called: name for name, names in CALLED.items() for called in names}


def checked_training_arguments(train: dict[str, Any]) -> dict[str, Any]:
    """The section with `yes`, `off` and the like as booleans where a boolean is asked for.

    Raises `ValueError` with a line for each name that is unknown or set elsewhere, and each value of the wrong kind.
    """
    from transformers import TrainingArguments

    known = {field.name: field for field in fields(TrainingArguments) if field.init}
    read = {name: _read(known.get(name), value) for name, value in train.items()}
    wrong = [
        f"train.{name}: {said}" for name, value in read.items() if (said := _complaint(known, name, value))
    ]
    if read.get("fp16") is True and read.get("use_cpu") is True:
        wrong.append(f"{NO_FLOAT16}, and train.use_cpu asks for one; set bf16, or neither")
    if wrong:
        raise ValueError("\n  ".join(wrong))
    return read


def _read(field: Field[Any] | None, value: Any) -> Any:
    """A value with ~ for the home folder, and words of YAML 1.1 as booleans where the field is one.

    They are so inside a mapping, too, which has no types.
    """
    if isinstance(value, dict):
        return {name: yes_or_no(inner) for name, inner in cast(dict[str, Any], value).items()}
    if field is not None and (_kinds(field) == {"bool"} or field.name in ALSO_BOOLEAN):
        value = yes_or_no(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def _kinds(field: Field[Any]) -> set[str]:
    """The types that a field takes, by name, None left out."""
    spelled = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return {kind.strip() for kind in spelled.split("|")} - {"None"}


def _complaint(known: Mapping[str, Field[Any]], name: str, value: Any) -> str | None:
    """What is wrong with one argument and what to do, or None."""
    name = MEANT.get(name, name) if MEANT.get(name) in OURS else name
    if name in OURS:
        return OURS[name]
    if name not in known:
        meant = f"; did you mean {MEANT[name]!r}?" if name in MEANT else did_you_mean(name, set(known))
        return f"TrainingArguments has no {name!r}{meant}"
    if name in AT_LEAST_ONE and not (type(value) is int and value >= 1):
        return f"expected a number from 1 on, found {value!r}"
    kinds = _kinds(known[name])
    if kinds == {"bool"} and not isinstance(value, bool | None):
        return f"expected true or false, found {value!r}"
    is_number = isinstance(value, int | float | None) and not isinstance(value, bool)
    if kinds <= {"int", "float"} and not is_number:
        return f"expected a number, found {value!r}"
    return None


def samples_per_step(train: dict[str, Any], num_processes: int) -> int:
    """Of an optimizer step, over all processes and accumulations: a resumed run may change it, a finished one not."""
    of_a_device = train.get("per_device_train_batch_size", 8)  # transformers' own defaults
    return of_a_device * train.get("gradient_accumulation_steps", 1) * num_processes
