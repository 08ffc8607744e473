"""Multiplications and additions of each stage for one sample, counted from the shapes of the models alone.

A matrix product of m x k by k x n is 2 m k n. Attention is counted over the whole square of positions, as a kernel
with a mask of padding computes it. Norms, activations, softmax, sums of losses, the optimizer and the trained heads
between teacher and student are left out: less than one percent at full size. `tests/test_bench_extrapolate.py` holds
the counts to those of torch's own counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATCHES = 24 * 24
PIXELS_OF_A_PATCH = 3 * 14 * 14
VISION_TOKENS = 12 * 12
VOCABULARY = 32000
BACKWARD = 2  # forwards' worth: gradients of inputs and of weights


@dataclass(frozen=True)
class Sample:
    """How long a sample is: positions of the decoder in all, text after the image, and those that predict answers."""

    positions: int
    text_rows: int
    answers: int


@dataclass(frozen=True)
class Model:
    """A MobileVLM V2, with as many key and value heads as query heads."""

    width: int
    inner: int
    layers: int
    tower_width: int
    tower_inner: int
    tower_layers: int  # of the checkpoint; the last never runs

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Model:
        """From a row of `random_models.MODELS`."""
        tower = settings["vision_config"]
        return cls(
            settings["hidden_size"],
            settings["intermediate_size"],
            settings["num_hidden_layers"],
            tower["hidden_size"],
            tower["intermediate_size"],
            tower["num_hidden_layers"],
        )

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
        """Attention of layer 0 beside SDPA: keys of every position, queries and scores of the text rows."""
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


def stage_2(student: Model, sample: Sample, *, checkpointing: bool) -> float:
    """Forward and backward of the student with every loss; the tower is frozen, so it runs forward alone.

    Checkpointing runs every layer of the decoder forward once more.
    """
    trained = (
        student.projector() + student.decoder(sample) + student.head(sample.answers) + student.tap(sample)
    )
    again = student.decoder(sample) if checkpointing else 0
    return student.tower() + (1 + BACKWARD) * trained + again


def online(teacher: Model, student: Model, sample: Sample, *, checkpointing: bool) -> float:
    """The same step with the whole teacher's forward in it."""
    return stage_1(teacher, sample) + stage_2(student, sample, checkpointing=checkpointing)
