"""A base without weights: what a twig's layers get besides hidden states, from ids, masks and image sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.anatomy import empty_network
from pipeline.models.stub import compute_buffers
from pipeline.models.tap import TAPPED
from pipeline.models.vlm import ImageFeatures, VisionLanguageModel
from pipeline.twig.layer_inputs import LayerInputs


class Scaffold:
    """The modules of a base, without its weights: its own forward makes masks and rotary positions.

    Embeddings and image features are zeros, which no mask and no position depends on; they take no memory. The layers
    stay on the meta device, where any use of them raises. `dtype` is that of the twig's layers.
    """

    def __init__(self, config: Any, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        network = empty_network(config, attention=TAPPED, dtype=dtype)
        compute_buffers(network, torch.device(device))
        self.width = config.get_text_config().hidden_size
        self.dtype = dtype
        self.vlm = VisionLanguageModel(network)
        _fill_with_zeros(network, torch.device(device))
        self.takes_list: bool | None = (
            None  # a list of features, or one tensor: known once there was an image
        )

    @torch.no_grad()
    def inputs(self, batch: Mapping[str, Any]) -> LayerInputs:
        """Return what layers get for a batch of `JoinCollator`, of which pixels are not read."""
        if not any(batch["sizes"]):
            return LayerInputs.record(self.vlm.network, self.vlm.inputs(batch, None))
        for is_list in (False, True) if self.takes_list is None else (self.takes_list,):
            features = self._features(batch, is_list=is_list)
            try:
                made = LayerInputs.record(self.vlm.network, self.vlm.inputs(batch, features))
            except TypeError:  # torch.cat of one tensor
                if is_list:
                    raise
                continue
            self.takes_list = is_list
            return made
        raise AssertionError("one of both forms is returned or raises")

    def _features(self, batch: Mapping[str, Any], *, is_list: bool) -> ImageFeatures:
        device = batch["input_ids"].device
        sizes = [size for of_sample in batch["sizes"] for size in of_sample]
        tokens = tuple(torch.zeros(size, self.width, dtype=self.dtype, device=device) for size in sizes)
        vision = getattr(self.vlm.config, "vision_config", None)
        num_added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        merged = getattr(vision, "spatial_merge_size", 1)
        return ImageFeatures(
            tokens=tokens,
            deepstack=tuple((one,) * num_added for one in tokens) if num_added else (),
            is_list=is_list,
            grids=_patch_grids(batch["grids"], merged, device)
            if "image_grid_thw" in self.vlm.accepted
            else (),
        )


def _fill_with_zeros(network: Any, device: torch.device) -> None:
    """Give every parameter outside the decoder's layers a single zero that stands for all of its values."""
    of_layers = {id(parameter) for parameter in network.get_decoder().layers.parameters()}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in of_layers:
                zero = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
                setattr(module, name, nn.Parameter(zero, requires_grad=False))


def _patch_grids(
    grids: Sequence[Sequence[tuple[int, int]]], merged: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return `image_grid_thw` of each image, in patches: `merged` patches along a side are one token."""
    return tuple(
        torch.tensor((1, rows * merged, columns * merged), device=device)
        for of_sample in grids
        for rows, columns in of_sample
    )
