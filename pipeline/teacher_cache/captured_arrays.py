"""What the teacher gives of a batch, as the arrays of its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pipeline.models.stub import Teacher
from pipeline.models.vlm import ImageFeatures
from pipeline.targets.target import Arrays, Target


def captured_arrays(
    teacher: Teacher,
    targets: Mapping[str, Target],
    batch: Mapping[str, Any],
    features: ImageFeatures | None,
    *,
    keys: Sequence[str],
    keep: Sequence[torch.Tensor],
) -> tuple[list[Arrays], list[Arrays]]:
    """Return the targets' arrays of each sample of a batch, and of each image of `keep`, float32 or integers.

    `features` are those of all its images in order, `keep` 'N D' of those to be stored.
    """
    forward = replace(teacher.forward(batch, features), keys=keys, vision=keep)
    captured: dict[str, list[Arrays]] = {"sample": [{} for _ in keys], "image": [{} for _ in keep]}
    for target in targets.values():
        for arrays, more in zip(captured[target.owner], target.capture(forward), strict=True):
            arrays |= more
    return captured["sample"], captured["image"]
