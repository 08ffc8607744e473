"""The Trainer's checkpoints: what is written, what is read back, and every private hook of transformers in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.training_args import OptimizerNames

from pipeline.config.config import Config
from pipeline.distill.model.adapters import adapter_tensors
from pipeline.distill.model.loss_module import LossModule
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.term_log import TermLog
from pipeline.distill.training.trained import Trained, TrainedStudent
from pipeline.distill.training.training_folder import HEADS_FILE, RUN_FILE
from pipeline.errors import building, writing
from pipeline.models.files.broken_files import named_if_broken

ADAPTERS_FILE = "adapters.safetensors"  # of a checkpoint with LoRA: its model has them merged
CORRECT_TRAIN = "correct the `train` section"


class ResumingTrainer(Trainer):
    """A Trainer whose checkpoint is what is trained as it is used, its heads, and the log line under way."""

    def __init__(
        self, *, settings: Config, identity: RunIdentity, trained: Trained | None = None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.settings = settings
        self.trained = trained or TrainedStudent(settings)
        self.identity = identity
        self.losses = settings.losses.active()
        self.term_log = TermLog()  # of this process, since the last log line
        self.last_logged_step = 0
        self.unlogged: dict[str, Any] | None = None  # of the checkpoint that the run resumes from

    @property
    def distiller(self) -> LossModule:
        return self.accelerator.unwrap_model(self.model)

    @property
    def log_names(self) -> list[str]:
        """What has a mean in the log: the losses, and what is observed beside them."""
        return [*self.losses, *self.distiller.observed]

    @property
    def keeps_sharded_state(self) -> bool:
        """Whether the optimizer is sharded and has a state: plain SGD has none."""
        return self.is_fsdp_enabled and self.args.optim != OptimizerNames.SGD

    # Writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights of a checkpoint. All processes must call it: they gather what the first one writes."""
        # Not `_save`, which some releases of transformers call in the first process alone.
        folder = Path(output_dir or str(self.args.output_dir))
        *terms, loss = self.sum_of_ranks(self.term_log.sums(self.log_names))
        tensors, heads = self.save_trained(folder)
        if not self.args.should_save:
            return
        if self.trained.lora is not None:
            (folder / ADAPTERS_FILE).write_bytes(save(adapter_tensors(tensors)))
        # Not save_file, whose files only their owner may read.
        (folder / HEADS_FILE).write_bytes(save(heads))
        unlogged = {"loss": loss, "last_logged_step": self.last_logged_step, "terms": terms}
        (folder / RUN_FILE).write_text(json.dumps(self.identity.to_json() | {"unlogged": unlogged}) + "\n")

    def save_trained(self, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Write what is trained, as it is used; return its and the heads' tensors.

        All processes must call it. Of a sharded model the tensors are whole in the first process alone.
        """
        state: Any = self.distiller.state_dict()
        if self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model)
        tensors, heads = (
            {name.removeprefix(part): v.contiguous() for name, v in state.items() if name.startswith(part)}
            for part in (f"{self.trained.part}.", "heads.")
        )
        if self.args.should_save:
            self.trained.write(folder, self.distiller, tensors)
        return tensors, heads

    def sum_of_ranks(self, values: list[float]) -> list[float]:
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.sum_over_ranks(mine).tolist()

    def sum_over_ranks(self, mine: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.reduce(mine, reduction="sum"))

    def _begin_log(self) -> None:
        self.term_log, self.last_logged_step = TermLog(), 0
        if self.unlogged is None:
            return
        self.last_logged_step = self.unlogged["last_logged_step"]
        if self.is_world_process_zero():  # the sums are those of all processes
            terms = self.unlogged["terms"][: 2 * len(self.log_names)]  # earlier versions added their coverage
            self.term_log = TermLog.of(self.log_names, [*terms, self.unlogged["loss"]])

    # Private hooks, tried with transformers 5.23 (pyproject.toml pins >=5.23,<5.24). tests/test_transformers_hooks.py
    # compares where the Trainer calls them; before the pin is raised, read what it reports.

    def _prepare_for_training(self, *arguments, **named):
        with building("train: the trainer cannot be built", then=CORRECT_TRAIN):
            prepared = super()._prepare_for_training(*arguments, **named)
        self._begin_log()  # also where `auto_find_batch_size` begins again with a smaller batch
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # of a sharded model a second copy of the weights, which nothing here reads
            (Path(output_dir) / "pytorch_model_fsdp.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        has_adapters = self.trained.lora is not None
        with named_if_broken(folder):
            tensors = self.trained.read(folder)
            if has_adapters:
                # The other weights hold the adapters merged. Training does not change them: they stay as loaded.
                whole = self.trained.whole_beside_adapters(self.distiller)
                of_full = {name: value for name, value in tensors.items() if name in whole}
                tensors = of_full | load_file(str(folder / ADAPTERS_FILE))
            heads = load_file(str(folder / HEADS_FILE))
            options = StateDictOptions(full_state_dict=True, strict=not has_adapters)
            set_model_state_dict(self.trained.of(self.distiller), cast(Any, tensors), options=options)
            if heads:  # labels alone need none, and torch refuses an empty state
                options = StateDictOptions(full_state_dict=True)
                set_model_state_dict(self.distiller.heads, cast(Any, heads), options=options)
        self.unlogged = json.loads((folder / RUN_FILE).read_text())["unlogged"]

    def _load_best_model(self) -> None:
        # The Trainer's own takes the file's names for those of the whole module, and would load nothing.
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled or self.keeps_sharded_state:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # torch finds the device of a sharded state by its tensors, and fails where there are none.
        schedule = cast(LambdaLR, self.lr_scheduler)
        schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate


def one_device_a_process(arguments: TrainingArguments) -> TrainingArguments:
    """Use only the first GPU of those that a process sees; several GPUs need several processes (torchrun).

    The Trainer would otherwise cut a batch into one piece a GPU, but images do not lie sample by sample.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
