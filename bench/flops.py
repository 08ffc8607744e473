"""Floating-point operations of each stage for one sample, counted by torch on models without weights.

Attention is counted over the whole square of positions, as a kernel with a padding mask computes it. Norms,
activations, softmax, sums of losses, the optimizer and the trained heads between teacher and student are left out:
less than one percent at full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models import IMAGE_SIZE, MODELS, VOCABULARY, Size, model_config
from pipeline.models.mobilevlm import MobileVLMForCausalLM

VISION_TOKENS = 12 * 12
BACKWARD = 2  # forwards' worth: gradients of inputs and of weights


@dataclass(frozen=True)
class Lengths:
    """Positions of the decoder in all, text after the image, and positions that predict answers."""

    positions: int
    text_rows: int
    answers: int


@dataclass(frozen=True)
class Forward:
    """Operations of a forward by part; `tap` is attention of layer 0 of the text rows, computed beside SDPA.

    `queries_and_keys` are the part of the decoder that comes before it.
    """

    tower: int
    projector: int
    decoder: int
    head: int
    tap: int
    queries_and_keys: int

    @property
    def without_tower(self) -> int:
        return self.projector + self.decoder + self.head + self.tap


@cache
def forward(size: Size, role: str, sample: Lengths) -> Forward:
    """Count a forward of one sample with one image, its head where answers are."""
    config = model_config(MODELS[size, role])
    width, positions = config.hidden_size, sample.positions
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        model = MobileVLMForCausalLM(config)
        with counter:
            model.get_image_features(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
            model.model(
                inputs_embeds=torch.zeros(1, positions, width),
                attention_mask=torch.ones(1, 1, positions, positions, dtype=torch.bool),
                position_ids=torch.arange(positions)[None],
                use_cache=False,
            )
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    tower, projector = counts["VisionTower"], counts["LDPNetV2"]
    # A product of m x k by k x n is 2 m k n.
    tap = 2 * sample.text_rows * positions * width
    head = 2 * sample.answers * width * VOCABULARY
    decoder = counts["Global"] - tower - projector
    return Forward(tower, projector, decoder, head, tap, queries_and_keys=4 * positions * width**2)


def stage_1(size: Size, sample: Lengths) -> int:
    """The teacher's forward and all targets."""
    teacher = forward(size, "teacher", sample)
    return teacher.tower + teacher.without_tower


def stub(size: Size, sample: Lengths, *, with_tower: bool = True) -> int:
    """Attention of layer 0 and vision alone; without the tower where the student's own gives the patch features."""
    teacher = forward(size, "teacher", sample)
    return with_tower * teacher.tower + teacher.projector + teacher.queries_and_keys + teacher.tap


def stage_2(size: Size, sample: Lengths, *, checkpointing: bool = True) -> int:
    """Forward and backward of the student with every loss; its frozen tower runs forward alone.

    Checkpointing runs every layer of the decoder forward once more.
    """
    student = forward(size, "student", sample)
    return student.tower + (1 + BACKWARD) * student.without_tower + checkpointing * student.decoder


def online(size: Size, sample: Lengths, *, checkpointing: bool = True) -> int:
    """The same step with the whole teacher's forward in it."""
    return stage_1(size, sample) + stage_2(size, sample, checkpointing=checkpointing)
