"""Floating-point operations of each stage for one sample, counted from the shapes of the models alone.

A matrix product of m x k by k x n is 2 m k n. Attention is counted over the whole square of positions, as a kernel
with a padding mask computes it. Norms, activations, softmax, sums of losses, the optimizer and the trained heads
between teacher and student are left out: less than one percent at full size. `tests/test_bench_extrapolate.py`
compares the counts with torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.models import VOCABULARY

PATCHES, PIXELS_OF_A_PATCH = 24 * 24, 3 * 14 * 14
VISION_TOKENS = 12 * 12
BACKWARD = 2  # forwards' worth: gradients of inputs and of weights


@dataclass(frozen=True)
class Sample:
    """Positions of the decoder in all, text after the image, and positions that predict answers."""

    positions: int
    text_rows: int
    answers: int


@dataclass(frozen=True)
class Model:
    """A MobileVLM V2 with as many key and value heads as query heads."""

    width: int
    inner: int
    layers: int
    tower_width: int
    tower_inner: int
    tower_layers: int  # of the checkpoint; the last never runs

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Model:
        """The model of a row of `MODELS`."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers")
        return cls(*(of[name] for of in (settings, settings["vision_config"]) for name in names))

    def tower(self) -> float:
        """Patches and the class token through every layer but the last."""
        tokens, width = PATCHES + 1, self.tower_width
        layer = 2 * tokens * (4 * width**2 + 2 * width * self.tower_inner) + 4 * tokens**2 * width
        return 2 * PATCHES * PIXELS_OF_A_PATCH * width + (self.tower_layers - 1) * layer

    def projector(self) -> float:
        """Two linear layers over the patches, a depthwise 3 x 3 convolution over the vision tokens."""
        linear = 2 * PATCHES * (self.tower_width * self.width + self.width**2)
        return linear + 2 * 9 * VISION_TOKENS * self.width

    def decoder(self, sample: Sample) -> float:
        """Every layer: four projections of attention, three of the inner layer, scores and values."""
        of_position = 2 * (4 * self.width**2 + 3 * self.width * self.inner)
        squares = 4 * sample.positions**2 * self.width
        return self.layers * (sample.positions * of_position + squares)

    def head(self, positions: int) -> float:
        """Logits over the whole vocabulary."""
        return 2 * positions * self.width * VOCABULARY

    def tap(self, sample: Sample) -> float:
        """Attention of layer 0, computed beside SDPA: keys of every position, queries and scores of text rows."""
        projections = 2 * (sample.positions + sample.text_rows) * self.width**2
        return projections + 2 * sample.text_rows * sample.positions * self.width


def bare(teacher: Model, sample: Sample) -> float:
    """The teacher's forward, logits where answers are."""
    return teacher.tower() + teacher.projector() + teacher.decoder(sample) + teacher.head(sample.answers)


def stage_1(teacher: Model, sample: Sample) -> float:
    """All targets."""
    return bare(teacher, sample) + teacher.tap(sample)


def stub(teacher: Model, sample: Sample, *, with_tower: bool = True) -> float:
    """Attention of layer 0 and vision alone; without the tower where the student's own gives the patch features."""
    return with_tower * teacher.tower() + teacher.projector() + teacher.tap(sample)


def stage_2(student: Model, sample: Sample, *, checkpointing: bool = True) -> float:
    """Forward and backward of the student with every loss; its frozen tower runs forward alone.

    Checkpointing runs every layer of the decoder forward once more.
    """
    decoder = student.decoder(sample)
    trained = student.projector() + decoder + student.head(sample.answers) + student.tap(sample)
    return student.tower() + (1 + BACKWARD) * trained + checkpointing * decoder


def online(teacher: Model, student: Model, sample: Sample, *, checkpointing: bool = True) -> float:
    """The same step with the whole teacher's forward in it."""
    return stage_1(teacher, sample) + stage_2(student, sample, checkpointing=checkpointing)
