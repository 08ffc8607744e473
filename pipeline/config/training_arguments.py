"""The `train` section: which TrainingArguments it takes, and what to write in place of the others."""

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
NO_FLOAT16 = "train.fp16: a CPU does not train in float16"

# TrainingArguments that the config sets elsewhere, or that transformers 5 renamed, with what to write instead.
OURS: dict[str, str] = {
    "output_dir": "set the config's own `output_dir`; the student is written below it",
    "remove_unused_columns": "it must be false for the join, and is",
    "gradient_checkpointing": "set `student.gradient_checkpointing`, or that of `twig`",
    "warmup_ratio": "transformers 5 takes `warmup_steps`; a value below 1 is a share of all steps",
    "label_smoothing_factor": "the terms of the loss are those of the `losses` section",
    "save_only_model": "a run could not be resumed from a checkpoint without its optimizer",
    "ignore_data_skip": "a resumed run trains only on the samples that are left of the epoch",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint in any case",
    "use_liger_kernel": "Liger's kernels were not tried with this student, whose head runs at answers alone",
    "neftune_noise_alpha": "the teacher saw no noise in its embeddings",
    **dict.fromkeys(
        ("hub_token", "push_to_hub_token"),
        "log in with `hf auth login`, or set HF_TOKEN: a config is written beside every result",
    ),
    **dict.fromkeys(
        ("push_to_hub", "push_to_hub_model_id", "push_to_hub_organization", "hub_model_id", "hub_strategy",
         "hub_private_repo", "hub_always_push", "hub_revision"),
        NOTHING_IS_SENT,
    ),
    "evaluation_strategy": "transformers 5 takes `eval_strategy`",
    "greater_is_better": "every metric is a loss, of which less is better",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), "held-out losses are computed as those of the training are"
    ),
    **dict.fromkeys(
        ("train_sampling_strategy", "group_by_length"),
        "samples are drawn at random, so that runs to be compared see the same order",
    ),
}  # fmt: skip

# How a run is logged and saved. This changes no weight.
OF_THE_LOG = ("disable_tqdm", "logging_first_step", "logging_steps", "logging_strategy", "report_to",
              "resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit")  # fmt: skip

# How the work is cut up. While `samples_per_step` stays, this changes weights by rounding alone.
HOW_IT_RUNS = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
               "dataloader_prefetch_factor", "ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
               "ddp_timeout", "gradient_accumulation_steps", "per_device_eval_batch_size",
               "per_device_train_batch_size")  # fmt: skip

AT_LEAST_ONE = ("per_device_eval_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
ALSO_BOOLEAN = ("fsdp", "resume_from_checkpoint")  # strings that may be true or false

# Names of other libraries for a training argument.
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
    """Return the section with `yes`, `off` and the like as booleans where the argument is one.

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
    if isinstance(value, dict):  # its values have no types, so that words are always booleans there
        return {name: yes_or_no(inner) for name, inner in cast(dict[str, Any], value).items()}
    if field is not None and (_kinds(field) == {"bool"} or field.name in ALSO_BOOLEAN):
        value = yes_or_no(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def _kinds(field: Field[Any]) -> set[str]:
    """Return the names of the types that a field takes, without None."""
    spelled = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return {kind.strip() for kind in spelled.split("|")} - {"None"}


def _complaint(known: Mapping[str, Field[Any]], name: str, value: Any) -> str | None:
    """Return what is wrong with an argument and what to do, or None."""
    meant = MEANT.get(name)
    if (elsewhere := OURS.get(name) or OURS.get(meant or "")) is not None:
        return elsewhere
    if name not in known:
        nearest = did_you_mean(name, set(known)) if meant is None else f"; did you mean {meant!r}?"
        return f"TrainingArguments has no {name!r}{nearest}"
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
    """Return the global batch: the samples of an optimizer step, over all processes and accumulations."""
    per_device = train.get("per_device_train_batch_size", 8)  # transformers' own default
    return per_device * train.get("gradient_accumulation_steps", 1) * num_processes
