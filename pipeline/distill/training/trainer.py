"""The Trainer of stage 2: sums of loss terms divided once a step, heads in the optimizer and in checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import TrainerCallback

from pipeline.config.config import Config
from pipeline.distill.join.dataset import Refused
from pipeline.distill.model.adapters import adapter_tensors, merged_tensors
from pipeline.distill.model.distiller import Distiller, Terms
from pipeline.distill.training.interruption import StopOnSignal, TakeUpLog
from pipeline.distill.training.resuming import CORRECT_TRAIN, RUN_FILE, ResumingTrainer
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.term_log import TermLog, gradient_shares
from pipeline.errors import ConfigError, PipelineError, building, writing
from pipeline.losses.losses import LOSSES
from pipeline.models.checkpoint import checkpoint_folder, named_if_broken
from pipeline.models.configuration import read_config
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.saved_files import save_tensors

HEADS_FILE = "heads.safetensors"
ADAPTERS_FILE = "adapters.safetensors"  # of a checkpoint with LoRA: its model has them merged
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "preprocessor_config.json")  # fmt: skip


class NonFiniteLossError(PipelineError):
    """A loss term became NaN or infinite; training stops before the optimizer sees it."""


class LeaveImagesOut(TrainerCallback):
    """Of a step of several processes that met no image, what only images train is left as it is, as in one process.

    There it has no gradient; here it has one of zero, by which an optimizer's momentum and decay would change it.
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


class DistillTrainer(ResumingTrainer):
    """A Trainer whose loss is the weighted sum of terms, each divided by its count over the whole step."""

    def __init__(self, *, settings: Config, identity: RunIdentity, **kwargs: Any):
        super().__init__(settings=settings, **kwargs)
        self.identity = identity
        self.losses = settings.losses.active()
        if settings.log_gradient_shares and self.is_fsdp_enabled:
            raise ConfigError(
                "log_gradient_shares needs whole gradients, but FSDP cuts them up; set it to false"
            )
        self.term_log = TermLog({}, {})
        self.gradient_shares: dict[str, float] = {}
        self.unlogged: dict[str, Any] | None = None
        self.has_images = True  # the step at work, in any process
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.add_callback(LeaveImagesOut(self))
        self.add_callback(TakeUpLog(self))
        # `get_batch_samples` returns counts over the whole optimizer step, so no further division is due.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and each loss term's count over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            Refused.check(batch)
        counts = torch.tensor([count_terms(batch, self.losses) for batch in batches], dtype=torch.float32)
        # Along go whether to stop after this step, which all ranks must do at once, and whether any has images.
        shown = any(batch["pixel_values"] is not None and not batch["is_filler"] for batch in batches)
        mine = torch.cat([counts.sum(dim=0), torch.tensor([float(self.stop.is_asked), float(shown)])])
        *summed, num_asked, num_shown = self.accelerator.reduce(mine.to(device), reduction="sum")
        if self.args.world_size > 1:
            self.stop.is_agreed, self.has_images = bool(num_asked > 0), bool(num_shown > 0)
        return batches, dict(zip(self.losses, summed, strict=True))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Any = None):
        """Weighted sum of the terms; every term's total is divided by its count over the whole step."""
        result: Terms = model(inputs)
        weighted: dict[str, torch.Tensor] = {}
        for name, (total, count) in result.terms.items():
            if not torch.isfinite(total):
                raise NonFiniteLossError(
                    f"losses.{name} became {total.item()} at step {self.state.global_step}; the weights of the last "
                    "checkpoint are sound: lower train.learning_rate, or check the store with `alignkd verify --deep`"
                )
            divisor = count if num_items_in_batch is None else num_items_in_batch[name]
            weight = 0.0 if inputs["is_filler"] else self.losses[name].weight
            weighted[name] = weight * total / divisor.clamp(min=1)
        if not inputs["is_filler"]:
            self.term_log.add(result)
        if self.settings.log_gradient_shares and self.accelerator.sync_gradients and self._is_logged():
            of_all = self._sum_over_ranks if self.args.world_size > 1 else None
            self.gradient_shares = gradient_shares(weighted, self.distiller.student, of_all=of_all)
        loss = torch.stack(list(weighted.values())).sum()
        # Ranks average their gradients; the sum over ranks is what the step's counts divide.
        loss = loss * self.accelerator.num_processes
        return (loss, result) if return_outputs else loss

    def _is_logged(self) -> bool:
        """Whether the Trainer logs this step, by `logging_steps`; other strategies are logged without shares."""
        return (self.state.global_step + 1) % self.state.logging_steps == 0

    def create_optimizer(self, model=None):
        """AdamW groups by learning rate and decay; every trained parameter is in one, the heads included."""
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
        student = self.settings.student
        rates = {
            "student.model.mm_projector.": student.projector_learning_rate,
            "heads.": student.head_learning_rate,
        }
        decayed = set(self.get_decay_parameter_names(self.distiller))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.distiller.named_parameters():
            if parameter.requires_grad:
                rate = next((r for prefix, r in rates.items() if name.startswith(prefix) and r), None)
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((rate or self.args.learning_rate, decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term, raw and weighted, and the coverage, to the Trainer's own line; samples to its last.

        The Trainer's own throughput is of this session: after a resume it leaves out what was done before.
        """
        if "train_runtime" in logs:
            logs["samples_seen"] = self.position.samples_seen
        if "loss" in logs:
            of_all = TermLog.of(self.losses, self._sum_of_ranks(self.term_log.sums(self.losses)))
            logs |= of_all.means(self.losses) | self.gradient_shares
            self.term_log, self.gradient_shares = TermLog({}, {}), {}
        super().log(logs, start_time)

    def _sum_of_ranks(self, values: list[float]) -> list[float]:
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self._sum_over_ranks(mine).tolist()

    def _sum_over_ranks(self, mine: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.reduce(mine, reduction="sum"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint is the student as Hugging Face users know it, and the heads beside it.

        For all processes: they gather what is written. Not `_save`, which some releases call in the first one alone.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        unlogged = self._unlogged()
        student, heads = self.save_student(folder)
        if not self.args.should_save:
            return
        if self.settings.student.lora is not None:
            save_tensors(adapter_tensors(student), folder / ADAPTERS_FILE)
        save_tensors(heads, folder / HEADS_FILE)
        run = {"identity": self.identity.digest, "made_of": self.identity.made_of, "began": self.began}
        run |= {"position": asdict(self.position), "unlogged": unlogged}
        (folder / RUN_FILE).write_text(json.dumps(run) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # of a sharded model a second copy of the weights, which nothing here reads
            (Path(output_dir) / "pytorch_model_fsdp.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        read_config(folder)
        with named_if_broken(folder):
            tensors = self._student_of(folder)
            heads = load_file(str(folder / HEADS_FILE))
            whole = StateDictOptions(full_state_dict=True, strict=self.settings.student.lora is None)
            set_model_state_dict(self.distiller.student, cast(Any, tensors), options=whole)
            if heads:  # labels alone have none, and torch takes no empty state
                set_model_state_dict(
                    self.distiller.heads, cast(Any, heads), options=StateDictOptions(full_state_dict=True)
                )
            self.unlogged = json.loads((folder / RUN_FILE).read_text())["unlogged"]

    def _unlogged(self) -> dict[str, Any]:
        """What all processes summed up since the last log line."""
        loss, *terms = self._sum_of_ranks([float(self._tr_loss), *self.term_log.sums(self.losses)])
        loss /= self.args.world_size  # the Trainer logs the mean over processes
        return {"loss": loss, "last_logged_step": self._globalstep_last_logged, "terms": terms}

    def take_up_log(self) -> None:
        """After a resume, go on with the sums of before, so that the next line is that of a run in one piece."""
        if self.unlogged is not None:
            self._tr_loss += self.unlogged["loss"]
            self._globalstep_last_logged = self.unlogged["last_logged_step"]
            if self.is_world_process_zero():
                self.term_log = TermLog.of(self.losses, self.unlogged["terms"])

    def save_student(self, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The student alone, in MobileVLM's layout, with its tokenizer: what `from_pretrained` reads.

        For all processes to call: the first writes. Returns what it has of the student's tensors and the heads'.
        """
        student, heads = self._tensors()
        if self.args.should_save:
            self._write_student(folder, student)
        return student, heads

    def _write_student(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        if (lora := self.settings.student.lora) is not None:
            tensors = merged_tensors(tensors, self.distiller.student.config, lora)
        self.distiller.student.save_pretrained(folder, state_dict=tensors)
        source = checkpoint_folder(self.settings.student.model)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)  # not its mode: a private original stays one

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Those of the student and those of the heads, by name; of a sharded model whole, in the first process."""
        state: Any = self.distiller.state_dict()
        if self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model)
        student, heads = (
            {name.removeprefix(part): v.contiguous() for name, v in state.items() if name.startswith(part)}
            for part in ("student.", "heads.")
        )
        return student, heads

    def _student_of(self, folder: Path) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors of the student; with adapters the trained ones, for the others are as they were."""
        student = MobileVLMForCausalLM.from_pretrained(folder, dtype=self.settings.student.dtype).state_dict()
        if self.settings.student.lora is None:
            return student
        projector = {name: value for name, value in student.items() if ".mm_projector." in name}
        return projector | load_file(str(folder / ADAPTERS_FILE))

    @property
    def distiller(self) -> Distiller:
        return self.accelerator.unwrap_model(self.model)


def count_terms(batch: Mapping[str, Any], losses: Mapping[str, Any]) -> list[int]:
    """What each loss will count in a batch, known before the forward: see `Loss.count`. Of a filler nothing."""
    if batch["is_filler"]:
        return [0] * len(losses)
    return [LOSSES[name].count(settings, batch) for name, settings in losses.items()]
