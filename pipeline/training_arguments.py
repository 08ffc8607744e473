"""`train:` of the config: what of TrainingArguments it takes, and what to write in place of the rest."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipeline.errors import did_you_mean

# TrainingArguments that the config sets elsewhere, or that transformers 5 renamed, with what to write instead.
OURS: dict[str, str] = {
    "output_dir": "set the config's own `output_dir`; the student is written below it",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN: a config is written beside every result",
    "push_to_hub_token": "log in with `hf auth login`, or set HF_TOKEN: a config is written beside every result",
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

# Of `train`: how a run is told of and kept, which changes no weight.
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


def check_training_arguments(train: dict[str, Any]) -> None:
    """Raises `ValueError` for a name that is unknown or set elsewhere, and for a value of the wrong kind."""
    from transformers import TrainingArguments

    known = {field.name: field.default for field in fields(TrainingArguments) if field.init}
    for name, value in train.items():
        if name in OURS:
            raise ValueError(f"train.{name}: {OURS[name]}")
        if name not in known:
            raise ValueError(
                f"train.{name}: TrainingArguments has no {name!r}{did_you_mean(name, set(known))}"
            )
        if name in AT_LEAST_ONE and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"train.{name}: expected a number from 1 on, found {value!r}")
        if type(known[name]) in (int, float) and not isinstance(value, int | float | None):
            raise ValueError(f"train.{name}: expected a number, found {value!r}")


def samples_per_step(train: dict[str, Any], num_processes: int) -> int:
    """Of an optimizer step, over all processes and accumulations: a resumed run may change it, a finished one not."""
    of_a_device = train.get("per_device_train_batch_size", 8)  # transformers' own defaults
    return of_a_device * train.get("gradient_accumulation_steps", 1) * num_processes
