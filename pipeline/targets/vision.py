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
    """Projected vision features, stored once for each distinct image of a shard; `step` belongs to `fixed_point`."""

    owner: ClassVar[Literal["sample", "image"]] = "image"

    source: Source = "cache"
    codec: Literal["fixed_point", "int8", "float16", "float32"] = "fixed_point"
    step: PowerOfTwo = 2**-7

    @property
    def deepest(self) -> int:
        return -1

    @property
    def first_array(self) -> str:
        return "vision"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        # Channel-major: neighbouring tokens of one channel are alike, neighbouring channels of one token are not.
        shape = (facts.hidden_size, facts.num_vision_tokens)
        options = {"step": self.step} if self.codec == "fixed_point" else {}
        return [ArraySpec("vision", "I D N", shape, "image", self.codec, options)]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """float32 '1 D N' of each image."""
        if forward.vision is None:
            return []
        return [{"vision": image.T[None].float().cpu().numpy()} for image in forward.vision]

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`vision`: float32 'I N D', all images of the batch in order."""
        images = np.concatenate([sample["vision"] for sample in samples])
        return {"vision": torch.from_numpy(images).transpose(1, 2).contiguous()}

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.images
