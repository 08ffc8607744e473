"""Targets made again beside the student: `source: recompute` runs a stub of the teacher instead of reading the store.

Attention of a shallow layer and projected vision features need a few percent of the teacher's weights and no disk.
Where student and teacher have one frozen tower, it runs once for both, or not at all when its features are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cache import Difference, FingerprintMismatch, Store
from pipeline.config import Config
from pipeline.memory import TensorCache
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.configuration import read_config
from pipeline.models.mobilevlm import TOWER_PREFIX
from pipeline.models.stub import Teacher, TeacherPlan, load_teacher, plan_teacher

REMEDY = (
    "give the teacher that the store was made with as teacher.model, or run `alignkd teacher-cache` with this config "
    "into a new store"
)


@dataclass
class RecomputedTargets:
    """A stub of the teacher. `shares_tower`: the student's patch features are the teacher's, too."""

    teacher: Teacher
    targets: Mapping[str, Any]
    shares_tower: bool
    vision: TensorCache

    def __call__(self, batch: Mapping[str, Any], patch_features: Tensor | None) -> dict[str, Any]:
        """Fields of `TeacherTargets` for a joined batch: `attention` float32 'B H T J', `vision` 'I N D'."""
        vision = self._vision(batch, patch_features)
        fields: dict[str, Any] = {}
        if "vision" in self.targets and vision is not None:
            fields["vision"] = vision.float()
        if (settings := self.targets.get("attention")) is not None:
            forward = self.teacher.forward(
                batch["input_ids"], batch["attention_mask"], batch["labels"], vision
            )
            mean = settings.heads == "mean"
            fields["attention"] = {
                layer: (block.mean(dim=1, keepdim=True) if mean else block).float()
                for layer, block in forward.attention.items()
            }
        return fields

    @torch.no_grad()
    def _vision(self, batch: Mapping[str, Any], patch_features: Tensor | None) -> Tensor | None:
        if batch["pixel_values"] is None:
            return None
        if self.shares_tower:
            assert patch_features is not None
            return self.teacher.model.encode_images(patch_features=patch_features)
        return self.vision.of_images(batch, self.teacher.encode_images)


def load_recomputed(config: Config, store: Store, *, device: torch.device) -> RecomputedTargets | None:
    """The stub for the targets that the config recomputes; None if it recomputes none.

    Raises `FingerprintMismatch` if its tensors are not those of the store's teacher.
    """
    targets = config.targets.recomputed()
    if not targets:
        return None
    plan = plan_teacher(config.teacher.model, targets=targets)
    check_teacher(store, plan)
    dtype = getattr(torch, str(store.manifest.capture["dtype"]))
    return RecomputedTargets(
        teacher=load_teacher(plan, dtype=dtype, device=device),
        targets=targets,
        shares_tower=shares_tower(config),
        vision=TensorCache(config.student.patch_feature_cache_bytes),
    )


def check_teacher(store: Store, plan: TeacherPlan) -> None:
    """Compare the stub's tensors, group by group, with what the store says of its teacher's."""
    stored = store.manifest.teacher.get("digests", {})
    differences = [
        Difference(f"teacher: {group}", stored.get(group, "not looked at by stage 1"), digest)
        for group, digest in plan.digests.items()
        if stored.get(group) != digest
    ]
    if differences:
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)


def shares_tower(config: Config) -> bool:
    """Whether both checkpoints hold one tower, to the last bit, and read the same layer of it."""
    teacher, student = Checkpoint(config.teacher.model), Checkpoint(config.student.model)
    shapes = [read_config(checkpoint.folder) for checkpoint in (teacher, student)]
    if shapes[0].mm_vision_select_layer != shapes[1].mm_vision_select_layer:
        return False
    names = [
        [n for n in checkpoint.names() if n.startswith(TOWER_PREFIX)] for checkpoint in (teacher, student)
    ]
    return names[0] == names[1] and teacher.digest(names[0]) == student.digest(names[1])
