"""Stage 2: train the student from the store with transformers.Trainer. No teacher weight is opened here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from cache import Fingerprint, FingerprintMismatch, Store, digest_of
from pipeline.config import Config
from pipeline.dataset import JoinCollator, JoinedDataset, teacher_facts
from pipeline.distiller import Distiller, Terms
from pipeline.errors import ConfigError
from pipeline.inputs import Preparation
from pipeline.losses import LOSSES
from pipeline.models.checkpoint import checkpoint_folder
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.provenance import save_provenance

HEADS_FILE = "heads.safetensors"
MODEL_FOLDER = "model"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "preprocessor_config.json")  # fmt: skip


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; training stops before the optimizer sees it."""


def train_student(config: Config, folder: Path) -> Path:
    """Train one student into `folder` and return its model's folder, in MobileVLM's own layout, without heads.

    A finished run of the same resolved config is left as it is. Raises `FingerprintMismatch` before any weight
    is loaded if the store is not what this config would have cached.
    """
    finished = folder / "finished.json"
    identity = run_identity(config)
    if finished.is_file() and json.loads(finished.read_text())["identity"] == identity:
        return folder / MODEL_FOLDER
    preparation = Preparation.of(config.student.model, config.data)
    store = Store(config.cache.path)
    check_fingerprint(store, config, preparation)
    targets = needed_targets(config)
    dataset = JoinedDataset(store, config.data.shards, preparation, targets=targets)
    save_provenance(folder, config)
    trainer = build_trainer(config, folder, store, dataset)
    trainer.train(resume_from_checkpoint=config.train.get("resume_from_checkpoint"))
    trainer.save_student(folder / MODEL_FOLDER)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    finished.write_text(json.dumps({"identity": identity, "steps": trainer.state.global_step}) + "\n")
    return folder / MODEL_FOLDER


def run_identity(config: Config) -> str:
    """What a finished run must agree with to be kept: everything that its weights depend on."""
    settings = config.model_dump(
        mode="json", include={"student", "data", "cache", "targets", "losses", "train"}
    )
    return digest_of(settings)


def check_fingerprint(store: Store, config: Config, preparation: Preparation) -> None:
    """Compare, field by field, what the store holds with what this config asks; raises `FingerprintMismatch`."""
    stored = store.manifest.fingerprint
    capture = {
        "targets": {name: s.model_dump(mode="json") for name, s in config.targets.active().items()},
        "max_length": config.data.max_length,
        # The dtype is the teacher's business; the store knows it and stage 2 has no other.
        "dtype": store.manifest.capture.get("dtype"),
    }
    mine = Fingerprint(teacher=stored.teacher, capture=digest_of(capture), **preparation.digests())
    if differences := stored.differences(mine):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)


REMEDY = (
    "set the config to what the store was made with (`alignkd info` shows it), or set cache.path to a new "
    "store and run `alignkd teacher-cache`"
)


def needed_targets(config: Config) -> dict[str, Any]:
    """The captured targets that the configured losses read, by name."""
    read = {target for name in config.losses.active() for target in LOSSES[name].targets}
    return {name: settings for name, settings in config.targets.active().items() if name in read}


def build_trainer(config: Config, folder: Path, store: Store, dataset: JoinedDataset) -> DistillTrainer:
    """Student, heads, optimizer and data, seeded: runs that differ in losses alone see the same data order."""
    arguments = TrainingArguments(output_dir=str(folder), **_train_options(config))
    set_seed(arguments.seed)
    student = load_student(config, store)
    distiller = Distiller(
        student,
        config.losses.active(),
        facts=teacher_facts(store),
        patch_feature_cache_bytes=config.student.patch_feature_cache_bytes,
    )
    return DistillTrainer(
        model=distiller,
        args=arguments,
        train_dataset=dataset,
        data_collator=JoinCollator(dataset.targets),
        settings=config,
    )


def load_student(config: Config, store: Store) -> MobileVLMForCausalLM:
    """The student's first weights. Raises `ConfigError` if it cannot be held to this teacher."""
    facts = teacher_facts(store)
    shape = MobileVLMConfig.from_pretrained(checkpoint_folder(config.student.model))
    for field, theirs, mine in (
        ("num_vision_tokens", facts.num_vision_tokens, shape.num_vision_tokens),
        ("vocab_size", facts.vocab_size, shape.vocab_size),
    ):
        if theirs != mine:
            raise ConfigError(
                f"student.model {config.student.model}: {field} is {mine}, the teacher of {store.path} has "
                f"{theirs}; Align-KD needs them equal: use a student of the teacher's family"
            )
    student = MobileVLMForCausalLM.from_pretrained(config.student.model, dtype=config.student.dtype)
    if config.student.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def _train_options(config: Config) -> dict[str, Any]:
    given = {name: value for name, value in config.train.items() if name != "resume_from_checkpoint"}
    return {"remove_unused_columns": False, "dataloader_pin_memory": torch.cuda.is_available()} | given


@dataclass
class TermLog:
    """Sums and counts of every loss term since the last log line."""

    totals: dict[str, float]
    counts: dict[str, float]
    coverage: float = 0.0
    batches: int = 0

    def add(self, terms: Terms) -> None:
        for name, (total, count) in terms.terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(total.detach())
            self.counts[name] = self.counts.get(name, 0.0) + float(count)
        self.coverage += float(terms.coverage)
        self.batches += 1

    def means(self, losses: Mapping[str, Any]) -> dict[str, float]:
        """Per term the mean (`loss/x`) and its part of the whole (`loss/x_weighted`), and `kd/coverage`."""
        entries = {}
        for name, settings in losses.items():
            mean = self.totals[name] / max(self.counts[name], 1.0)
            entries |= {f"loss/{name}": mean, f"loss/{name}_weighted": settings.weight * mean}
        return entries | {"kd/coverage": self.coverage / self.batches}


class DistillTrainer(Trainer):
    """transformers.Trainer whose loss is the weighted sum of terms, each divided by its count over the whole step."""

    def __init__(self, *, settings: Config, **kwargs: Any):
        super().__init__(**kwargs)
        self.settings = settings
        self.losses = settings.losses.active()
        self.term_log = TermLog({}, {})
        # `get_batch_samples` returns counts over the whole optimizer step, so no further division is due.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and each loss term's count over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.tensor([count_terms(batch, self.losses) for batch in batches], dtype=torch.float32)
        summed = self.accelerator.reduce(counts.sum(dim=0).to(device), reduction="sum")
        return batches, dict(zip(self.losses, summed, strict=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of the terms; every term's total is divided by its count over the whole step."""
        result: Terms = model(inputs)
        loss = torch.zeros((), dtype=torch.float32, device=self.args.device)
        for name, (total, count) in result.terms.items():
            if not torch.isfinite(total):
                raise NonFiniteLossError(
                    f"losses.{name} became {float(total)} at step {self.state.global_step}; the weights of the last "
                    "checkpoint are sound: lower train.learning_rate, or check the store with `alignkd verify --deep`"
                )
            divisor = count if num_items_in_batch is None else num_items_in_batch[name]
            loss = loss + self.losses[name].weight * total / divisor.clamp(min=1)
        self.term_log.add(result)
        # Ranks average their gradients; the sum over ranks is what the step's counts divide.
        loss = loss * self.accelerator.num_processes
        return (loss, result) if return_outputs else loss

    def create_optimizer(self, model=None):
        """AdamW groups by learning rate and decay; every trained parameter is in one, the heads included."""
        if self.optimizer is None:
            options_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = options_class(self._parameter_groups(), **options)
        grouped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        left_out = [
            name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in grouped
        ]
        assert not left_out, f"parameters in no optimizer group: {left_out}"
        return self.optimizer

    def _parameter_groups(self) -> list[dict[str, Any]]:
        student = self.settings.student
        rates = {
            "student.model.mm_projector.": student.projector_learning_rate,
            "heads.": student.head_learning_rate,
        }
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = next((r for prefix, r in rates.items() if name.startswith(prefix) and r), None)
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((rate or self.args.learning_rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term, raw and weighted, and the coverage, to the Trainer's own line."""
        if "loss" in logs and self.term_log.batches:
            logs |= self.term_log.means(self.losses)
            self.term_log = TermLog({}, {})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint is the student as Hugging Face users know it, and the heads beside it."""
        folder = Path(output_dir or self.args.output_dir)
        self.save_student(folder)
        heads = {name: value.contiguous() for name, value in self.distiller.heads.state_dict().items()}
        save_file(heads, str(folder / HEADS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        student = MobileVLMForCausalLM.from_pretrained(folder, dtype=self.settings.student.dtype)
        self.distiller.student.load_state_dict(student.state_dict())
        self.distiller.heads.load_state_dict(load_file(str(folder / HEADS_FILE)))

    def save_student(self, folder: Path) -> None:
        """The student alone, in MobileVLM's layout, with its tokenizer: what `from_pretrained` reads."""
        self.distiller.student.save_pretrained(folder)
        source = checkpoint_folder(self.settings.student.model)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, folder)

    @property
    def distiller(self) -> Distiller:
        return self.accelerator.unwrap_model(self.model)


def count_terms(batch: Mapping[str, Any], losses: Mapping[str, Any]) -> list[int]:
    """What each loss will count in a batch, known before the forward: see `Loss.count`."""
    return [LOSSES[name].count(settings, batch) for name, settings in losses.items()]
