"""EfficientNet-Lite as a vision tower (arXiv 1905.11946, the Lite variant): images -> a grid of patch features.

Only stem and blocks, under the names of the public PyTorch checkpoints. The last 1 x 1 convolution and the
classifier, which follow there, widen features for 1,000 classes; scenes were told apart better without them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.shapes import expect_shape

# (number of blocks, expansion, channels, kernel, stride of the first): the paper's table 1.
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
    """Geometry of the tower."""

    model_type = "efficientnet_lite"

    image_size: int = 256
    num_channels: int = 3
    stem_channels: int = 32
    blocks: list | tuple = LITE0_BLOCKS
    batch_norm_eps: float = 1e-3

    @property
    def hidden_size(self) -> int:
        """W, the width of a patch feature: channels of the last block."""
        return self.blocks[-1][2]


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics, in training mode as well: the tower is always frozen."""

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
    """A convolution with TensorFlow's SAME padding: an odd pixel of padding goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        padding: list[int] = []
        for axis in (1, 0):  # nn.functional.pad takes the last axis first
            size, stride = input.shape[2 + axis], self.stride[axis]
            total = max((-(-size // stride) - 1) * stride + self.kernel_size[axis] - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(input, padding))


class InvertedBottleneck(nn.Module):
    """Expands, convolves each channel, projects, and adds the input if the shapes allow."""

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
        self._blocks = nn.ModuleList()
        width = config.stem_channels
        for repeats, expansion, channels, kernel, first_stride in config.blocks:
            for stride in (first_stride, *[1] * (repeats - 1)):
                sizes = {"expansion": expansion, "kernel": kernel, "stride": stride, "eps": eps}
                self._blocks.append(InvertedBottleneck(width, channels, **sizes))
                width = channels

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features after the last block: 'I C Y X' -> 'I W Y/32 X/32' (Lite0 halves five times)."""
        hidden = nn.functional.relu6(self._bn0(self._conv_stem(pixel_values)))
        for block in self._blocks:
            hidden = block(hidden)
        return hidden


class EfficientNetLiteTower(nn.Module):
    """The frozen tower, with the interface of the CLIP one: patch features, row by row."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__()
        self.config = config
        self.vision_tower = EfficientNetLiteLayers(config)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return patch features, without gradient: 'I C Y X' -> 'I M W'."""
        size = self.config.image_size
        expect_shape("pixel_values", pixel_values, f"I {self.config.num_channels} {size} {size}")
        return self.vision_tower(pixel_values).flatten(2).transpose(1, 2)
