"""LoRA (arXiv 2106.09685): small trained matrices beside the decoder's frozen ones, merged into what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.config.model_settings import LoraConfig
from pipeline.errors import ConfigError, did_you_mean

ADAPTER = "default"  # peft's own name for a model's one adapter
IN_LAYER, FIRST, SECOND = ".base_layer", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(student: Any, settings: LoraConfig) -> None:
    """Put adapters into the decoder's layers, in place: they and the projector are trained, all else is frozen.

    Raises `ConfigError` if peft is not installed, or a target is no linear map of a decoder layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "student.lora needs the package peft, which is not installed; run `pip install 'alignkd[lora]'`, or "
            "remove the section to train all weights"
        ) from error
    known = _linear_maps(student.model.layers[0])
    for name in settings.target_modules:
        if name not in known:
            raise ConfigError(
                f"student.lora.target_modules: no decoder layer has a linear map {name!r}"
                f"{did_you_mean(name, known)}"
            )
    chosen = "|".join(settings.target_modules)
    adapters = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] - divided by the rank, so no whole number
        lora_dropout=settings.dropout,
        target_modules=rf"model\.layers\.\d+\..*\.({chosen})",  # the tower has layers of these names, too
    )
    peft.inject_adapter_in_model(adapters, student)
    student.model.mm_projector.requires_grad_(True)


def _linear_maps(layer: nn.Module) -> set[str]:
    return {
        name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, nn.Linear)
    }


def adapter_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a student's tensors those of its adapters: what a merged checkpoint cannot give back."""
    return {name: value for name, value in state.items() if name.endswith((FIRST, SECOND))}


def merged_tensors(state: Mapping[str, torch.Tensor], settings: LoraConfig) -> dict[str, torch.Tensor]:
    """A student's tensors under the names of one without adapters: W + alpha / rank * B A, summed in float32."""
    merged: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        prefix = name.partition(IN_LAYER)[0]
        if name.endswith((FIRST, SECOND)):
            continue
        if name.endswith(f"{IN_LAYER}.weight"):
            change = state[prefix + SECOND].float() @ state[prefix + FIRST].float()
            value = (value.float() + settings.alpha / settings.rank * change).to(value.dtype)
        merged[name.replace(IN_LAYER, "")] = value
    return merged
