"""LoRA (arXiv 2106.09685): small trained matrices beside the frozen weights of the decoder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.config.model_settings import LoraConfig
from pipeline.errors import ConfigError, did_you_mean, needing
from pipeline.models.anatomy import empty_network
from pipeline.models.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from peft import LoraModel  # pyright: ignore[reportMissingImports]


def add_adapters(student: Any, settings: LoraConfig) -> LoraModel:
    """Put adapters into the decoder's layers, in place. They and the projector are trained, all else is frozen.

    Raises `ConfigError` if peft is not installed, or if a target is not a linear map of a decoder layer.
    """
    connector = VisionLanguageModel(student).connector_names
    return add_adapters_to(student, student.get_decoder().layers, settings, trained=connector)


def add_adapters_to(
    model: nn.Module,
    layers: nn.ModuleList,
    settings: LoraConfig,
    *,
    trained: Collection[str],
    section: str = "student.lora",
) -> LoraModel:
    """Put adapters into the `layers` of a model, in place. They and the parameters named `trained` are trained.

    Raises as `add_adapters`, naming the `section`.
    """
    with needing("lora", by=section, otherwise="remove the section to train all weights"):
        import peft
    first = layers[0].named_modules()
    known = {name.rpartition(".")[2] for name, module in first if isinstance(module, nn.Linear)}
    for name in settings.target_modules:
        if name not in known:
            raise ConfigError(
                f"{section}.target_modules: no decoder layer has a linear map {name!r}"
                f"{did_you_mean(name, known)}"
            )
    chosen = "|".join(settings.target_modules)
    [prefix] = [name for name, module in model.named_modules() if module is layers]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] - divided by the rank, so no whole number
        lora_dropout=settings.dropout,
        target_modules=rf"{re.escape(prefix)}\.\d+\..*\.({chosen})",  # the tower has layers of these names, too
    )
    adapted = peft.LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    return adapted


def adapter_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the adapters' tensors of a student's state. Merged weights cannot give them back."""
    return {name: value for name, value in state.items() if ".lora_" in name}


def merged_tensors(
    state: Mapping[str, torch.Tensor], config: Any, settings: LoraConfig
) -> dict[str, torch.Tensor]:
    """Return the state of a student without adapters: W + alpha / rank * B A, under the names of the plain model."""
    student = empty_network(config)
    with torch.device("meta"):
        adapted = add_adapters(student, settings)
    return merged_into(student, adapted, state)


def merged_into(
    empty: nn.Module, adapted: LoraModel, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return `merged_tensors` of a model, with `empty`, the same model without weights, and its adapters."""
    # Copies, because peft adds to W in place and training continues with the W in `state`. In float32, because peft
    # rounds B A to their dtype before it adds them: the sum is rounded once, at the end.
    wide = {name for name in state if ".base_layer." in name or ".lora_" in name}
    copies = {
        name: value.to("cpu", torch.float32 if name in wide else value.dtype, copy=True)
        for name, value in state.items()
    }
    empty.load_state_dict(copies, assign=True)
    dtypes = {name.replace(".base_layer.", "."): value.dtype for name, value in state.items()}
    merged: Mapping[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return {name: value.to(dtypes[name]) for name, value in merged.items()}
