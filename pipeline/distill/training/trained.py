"""What a training trains: its name in the loss module, how it is written and read back, and its learning rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from pipeline.config.config import Config
from pipeline.config.model_settings import LoraConfig
from pipeline.distill.model.adapters import merged_tensors
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.model.loss_module import LossModule
from pipeline.distill.training.training_folder import STUDENT, Product
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder, copy_processor
from pipeline.models.loading import load_network


class Trained(ABC):
    """The part of a `LossModule` that is trained and saved: a student, or a twig."""

    part: ClassVar[str]  # its name in the module
    product: ClassVar[Product]  # what a training leaves of it
    lora: LoraConfig | None

    def of(self, module: LossModule) -> nn.Module:
        """Return it."""
        return module.get_submodule(self.part)

    @abstractmethod
    def whole_beside_adapters(self, module: LossModule) -> Collection[str]:
        """Return the names of its parameters that are trained in full beside LoRA's adapters."""

    @abstractmethod
    def learning_rate(self, module: LossModule, name: str) -> float | None:
        """Return the learning rate of a parameter of the module; None: that of the training."""

    @abstractmethod
    def write(self, folder: Path, module: LossModule, tensors: Mapping[str, Tensor]) -> None:
        """Write its tensors, whole and with adapters merged, as it is used afterwards."""

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors that `write` wrote, by the names that they have in it."""


class TrainedStudent(Trained):
    """A student, in its family's own layout."""

    part = "student"
    product = STUDENT

    def __init__(self, settings: Config):
        self.settings = settings.student
        self.lora = settings.student.lora

    def whole_beside_adapters(self, module: LossModule) -> Collection[str]:
        """Return the names of the projector's parameters."""
        return cast(Distiller, module).vlm.connector_names

    def learning_rate(self, module: LossModule, name: str) -> float | None:
        """Return the projector's learning rate, or that of the heads."""
        if name.removeprefix("student.") in cast(Distiller, module).vlm.connector_names:
            return self.settings.projector_learning_rate
        return self.settings.head_learning_rate if name.startswith("heads.") else None

    def write(self, folder: Path, module: LossModule, tensors: Mapping[str, Tensor]) -> None:
        """Write the student with its tokenizer, as `from_pretrained` reads it."""
        student: Any = cast(Distiller, module).student
        if self.lora is not None:
            tensors = merged_tensors(tensors, student.config, self.lora)
        student.save_pretrained(folder, state_dict=tensors)
        copy_processor(checkpoint_folder(self.settings.model), folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint."""
        read_config(folder)
        return load_network(str(folder), dtype=self.settings.dtype).state_dict()
