"""The vision tower and the projector as one program: the pixels of a picture -> its vision tokens 'N D'."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.export.executorch.inputs import Prompt
from pipeline.export.executorch.lowering import Method, write_program

OTHERWISE = "export another family, or use `export hf`"


class VisionModule(nn.Module):
    """`get_image_features` of any family, for one picture; `rest` are its inputs beside the pixels, as constants."""

    def __init__(self, network: Any, rest: dict[str, Tensor]) -> None:
        super().__init__()
        taken = inspect.signature(network.get_image_features).parameters
        self.network = network
        self.rest = {name: tensor for name, tensor in rest.items() if name in taken}

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return 'N D'."""
        return tokens_of(
            self.network.get_image_features(pixel_values=pixel_values, **self.rest, return_dict=True)
        )


def tokens_of(output: Any) -> Tensor:
    """Return what `get_image_features` made as 'N D': families return a tensor, or a list of images or tiles."""
    pooled = output.pooler_output
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([part.flatten(0, -2) for part in parts])


def write_vision(network: Any, prompt: Prompt, file: Path) -> None:
    """Write the program, for pictures of this prompt's shape. Raises `ConfigError` if the exporter refuses it."""
    family = network.config.model_type
    module = VisionModule(network, prompt.rest)
    _check_features(module, prompt)
    what = f"the vision tower of {family!r}"
    write_program({"forward": Method(module, (prompt.pixels,))}, file, what=what, otherwise=OTHERWISE)


@torch.no_grad()
def _check_features(module: VisionModule, prompt: Prompt) -> None:
    output = module.network.get_image_features(pixel_values=prompt.pixels, **module.rest, return_dict=True)
    if getattr(output, "deepstack_features", None):
        raise ConfigError(
            f"the decoder of {module.network.config.model_type!r} reads features of several layers of the tower, a "
            f"program here returns those of one; {OTHERWISE}"
        )
