"""EfficientNet-Lite as a vision tower (arXiv 1905.11946, the Lite variant): images -> a grid of patch features.

The blocks alone, under the names of the public PyTorch checkpoints. What follows them there (the last 1 x 1
convolution and the classifier) widens features for 1,000 classes; scenes were told apart better without it.
Batch normalisation always uses the trained statistics: the tower is frozen in every stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.shapes import expect_shape

# (how many blocks, expansion, channels, kernel, stride of the first), the paper's table 1.
LITE0_BLOCKS = (
    (1, 1, 16, 3, 1),
    (2, 6, 24, 3, 2),
    (2, 6, 40, 5, 2),
    (3, 6, 80, 3, 2),
    (3, 6, 112, 5, 1),
    (4, 6, 192, 5, 2),
    (1, 6, 320, 3, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """Geometry of the tower; the width W of a patch feature is that of the last block."""

    model_type = "efficientnet_lite"

    image_size: int = 256
    num_channels: int = 3
    stem_channels: int = 32
    blocks: list | tuple = LITE0_BLOCKS
    batch_norm_eps: float = 1e-3

    @property
    def hidden_size(self) -> int:
        """W: channels of the last block."""
        return self.blocks[-1][2]


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in training mode as well: 'I C Y X' -> 'I C Y X'."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, *, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            inputs, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class SameConvolution(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: an odd pixel of padding goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(input, padding))


class InvertedBottleneck(nn.Module):
    """Expand, convolve each channel, project; with the input added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int, eps: float):
        super().__init__()
        width = inputs * expansion
        self.expands, self.adds_input = expansion != 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConvolution(inputs, width, 1, bias=False)
            self._bn0 = FrozenBatchNorm(width, eps=eps)
        self._depthwise_conv = SameConvolution(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = FrozenBatchNorm(width, eps=eps)
        self._project_conv = SameConvolution(width, outputs, 1, bias=False)
        self._bn2 = FrozenBatchNorm(outputs, eps=eps)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        if self.expands:
            hidden = nn.functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = nn.functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + inputs if self.adds_input else hidden


class EfficientNetLiteLayers(nn.Module):
    """Stem and blocks of an EfficientNet-Lite checkpoint."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__()
        eps = config.batch_norm_eps
        self._conv_stem = SameConvolution(config.num_channels, config.stem_channels, 3, 2, bias=False)
        self._bn0 = FrozenBatchNorm(config.stem_channels, eps=eps)
        blocks, width = [], config.stem_channels
        for repeats, expansion, channels, kernel, stride in config.blocks:
            for number in range(repeats):
                blocks.append(
                    InvertedBottleneck(
                        width,
                        channels,
                        expansion=expansion,
                        kernel=kernel,
                        stride=stride if number == 0 else 1,
                        eps=eps,
                    )
                )
                width = channels
        self._blocks = nn.ModuleList(blocks)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features after the last block: 'I C Y X' -> 'I W Y/32 X/32' (Lite0 halves five times)."""
        hidden = nn.functional.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            hidden = block(hidden)
        return hidden


class EfficientNetLiteTower(nn.Module):
    """The frozen tower with the interface of the CLIP one: images -> patch features, row by row."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__()
        self.config = config
        self.vision_tower = EfficientNetLiteLayers(config)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features, without gradient: 'I C Y X' -> 'I M W'."""
        size = self.config.image_size
        expect_shape("pixel_values", pixel_values, f"I {self.config.num_channels} {size} {size}")
        return self.vision_tower(pixel_values).flatten(2).transpose(1, 2)
