"""The vision target: the teacher's projected vision features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from cache import ArraySpec
from pipeline.positions import Counts
from pipeline.settings import PowerOfTwo
from pipeline.targets.target import Arrays, Source, Target, TeacherFacts, TeacherForward


class VisionTarget(Target):
    """Projected vision features of the teacher, stored once for each distinct image of a shard."""

    owner: ClassVar[Literal["sample", "image"]] = "image"

    source: Source = "cache"
    """`cache` stores it, `recompute` lets stage 2 recompute it with a stub of the teacher.
    [stage 1, stage 2; store, run]"""
    codec: Literal["fixed_point", "int8", "float16", "float32"] = "fixed_point"
    """How they are stored. [stage 1, stage 2; store, run]"""
    step: PowerOfTwo = 2**-7
    """Step of the codec `fixed_point`, a power of two. [of a feature; stage 1, stage 2; store, run]"""

    @property
    def deepest(self) -> int:
        return -1

    @property
    def first_array(self) -> str:
        return "vision"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        # Channel-major: neighbouring tokens of one channel are alike, neighbouring channels of one token are not.
        shape = (facts.hidden_size, None)
        options = {"step": self.step} if self.codec == "fixed_point" else {}
        return [ArraySpec("vision", "I D N", shape, "image", self.codec, options)]

    def of_images(self) -> list[str]:
        return ["vision"]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """float32 '1 D N' of each image."""
        return [{"vision": image.T[None].float().cpu().numpy()} for image in forward.vision]

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`vision`: float32 'G D', the vision tokens of all images of the batch in order."""
        images = [
            torch.from_numpy(image.reshape(image.shape[-2:])).T
            for sample in samples
            for image in sample["vision"]
        ]
        return {"vision": torch.cat(images) if images else torch.zeros(0, 1)}

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        return {"vision": [np.zeros((facts.hidden_size, size), np.float32) for size in sizes]}

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.images
