"""How a training writes its twig, and reads it back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.config.model_settings import LoraConfig
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.model.adapters import add_adapters_to, merged_into
from pipeline.distill.model.loss_module import LossModule
from pipeline.distill.training.trained import Trained
from pipeline.distill.training.training_folder import Product
from pipeline.models.files.broken_files import named_if_broken
from pipeline.twig.folder import DRAFT_IDS, WEIGHTS, read_tensors, read_twig_config, save_twig
from pipeline.twig.module import Twig
from pipeline.twig.training.beginning import Beginning
from pipeline.twig.training.frequent import frequent_labels
from pipeline.twig.training.twig_distiller import TwigDistiller

if TYPE_CHECKING:
    from peft import LoraModel  # pyright: ignore[reportMissingImports]

TWIG_FOLDER = "twig"


def _look_at_twig(folder: Path) -> None:
    read_twig_config(folder)
    with named_if_broken(folder / WEIGHTS), safe_open(folder / WEIGHTS, framework="pt") as tensors:
        tensors.keys()


TWIG = Product(TWIG_FOLDER, _look_at_twig)


def with_adapters(twig: Twig, settings: LoraConfig) -> LoraModel:
    """Put adapters into a twig's layers, in place; its norm and its head are trained in full."""
    return add_adapters_to(twig, twig.layers, settings, trained=_beside_layers(twig), section="twig.lora")


def _beside_layers(twig: Twig) -> set[str]:
    return {name for name, _ in twig.named_parameters() if not name.startswith("layers.")}


class TrainedTwig(Trained):
    """A twig, in a folder of its own that names its base."""

    part = "twig"
    product = TWIG

    def __init__(self, beginning: Beginning, dataset: JoinedDataset):
        self.beginning, self.dataset = beginning, dataset
        self.lora = beginning.settings.lora

    @cached_property
    def draft_ids(self) -> Tensor | None:
        """The only tokens that the twig is to draft, None: all."""
        most = self.beginning.settings.draft_vocabulary
        return None if most is None else frequent_labels(self.dataset, most)

    def whole_beside_adapters(self, module: LossModule) -> Collection[str]:
        """Return the names of norm and head."""
        return _beside_layers(cast(TwigDistiller, module).twig)

    def learning_rate(self, module: LossModule, name: str) -> float | None:
        """Return None: all of a twig has the learning rate of the training."""
        return None

    def write(self, folder: Path, module: LossModule, tensors: Mapping[str, Tensor]) -> None:
        """Write the twig, with its adapters merged."""
        geometry = self.beginning.geometry
        if self.lora is not None:
            plain = self.beginning.empty_twig()
            with torch.device("meta"):
                adapted = with_adapters(plain, self.lora)
            tensors = merged_into(plain, adapted, tensors)
        ids = {} if self.draft_ids is None else {DRAFT_IDS: self.draft_ids}
        save_twig(folder, {**tensors, **ids}, geometry, self.beginning.base)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the twig's parameters."""
        return {name: tensor for name, tensor in read_tensors(folder).items() if name != DRAFT_IDS}
