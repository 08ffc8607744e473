"""Targets recomputed during training by a stub of the teacher, instead of being read from the store.

`source: recompute` does so for every sample, `on_missing: recompute` for the samples that a store lacks. Attention of
a shallow layer and projected vision features need a few percent of the teacher's weights and no disk. Where student
and teacher have the same frozen tower, it runs once for both, or not at all when its features are held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cache import Difference, FingerprintMismatch, Store
from pipeline.config.config import Config
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import ConfigError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.configuration import read_config
from pipeline.models.mobilevlm import TOWER_PREFIX
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import TeacherPlan, plan_teacher
from pipeline.positions import Counts
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.target import Target, TeacherFacts
from pipeline.targets.targets import TARGETS

REMEDY = (
    "give the teacher that the store was made with as teacher.model, or run `alignkd teacher-cache` with this config "
    "into a new store"
)


@dataclass
class RecomputedTargets:
    """A stub of the teacher and what it gives: `targets` to every sample, `missing` to samples that a store lacks.

    `shares_tower`: the student's patch features are the teacher's, too.
    """

    teacher: Teacher
    targets: Mapping[str, Target]
    shares_tower: bool
    vision: TensorCache
    missing: Mapping[str, Target] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, TeacherFacts]:
        """The stub's facts, for each target that it gives to every sample."""
        return dict.fromkeys(self.targets, self.teacher.plan.facts)

    def __call__(self, batch: Mapping[str, Any], patch_features: Tensor | None) -> Mapping[str, Any]:
        """Return a joined batch with the targets that no store gave; what a store gave stays as it is."""
        made = self._make(self.targets, batch, patch_features) if self.targets else {}
        batch = {**batch, "targets": {**batch["targets"], **made}}
        return self._fill(batch, patch_features) if batch["lacking"] else batch

    def _fill(self, batch: Mapping[str, Any], patch_features: Tensor | None) -> Mapping[str, Any]:
        """Run the stub on the samples that lack something, and on no other."""
        lacking: dict[str, Tensor] = batch["lacking"]
        counts = Counts.of(batch)
        chosen = torch.stack(list(lacking.values())).any(dim=0)
        of_chosen = chosen.repeat_interleave(counts.images)
        features = None if patch_features is None else patch_features[of_chosen]
        wanted = {name: self.missing[name] for name in lacking}
        made = self._make(wanted, _part_of(batch, chosen, of_chosen), features)
        targets, received = {**batch["targets"]}, {**batch["received"]}
        if (lacks := lacking.get("vision")) is not None:
            of_image = lacks.repeat_interleave(counts.images)
            targets["vision"] = targets["vision"].index_put((of_image,), made["vision"][of_image[of_chosen]])
        if (lacks := lacking.get("attention")) is not None:
            targets["attention"] = {
                layer: _put(stored, lacks, made["attention"][layer][lacks[chosen]])
                for layer, stored in targets["attention"].items()
            }
        for name, lacks in lacking.items():
            received[name] = torch.where(lacks, TARGETS[name].num_rows(counts), received[name])
        return {**batch, "targets": targets, "received": received, "lacking": {}}

    def _make(
        self, targets: Mapping[str, Target], batch: Mapping[str, Any], patch_features: Tensor | None
    ) -> dict[str, Any]:
        """Return the fields of `TeacherTargets` for a batch: `attention` float32 'B H T J', `vision` 'I N D'."""
        vision = self._vision(batch, patch_features)
        fields: dict[str, Any] = {}
        if "vision" in targets and vision is not None:
            fields["vision"] = vision.float()
        if isinstance(attention := targets.get("attention"), AttentionTarget):
            forward = self.teacher.forward(
                batch["input_ids"], batch["attention_mask"], batch["labels"], vision
            )
            fields["attention"] = {
                layer: attention.reduce_heads(block).float() for layer, block in forward.attention.items()
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


def _part_of(batch: Mapping[str, Any], chosen: Tensor, of_image: Tensor) -> dict[str, Any]:
    """Return the chosen samples, bool 'B', with their images, bool 'I', as far as a stub reads them."""
    part = {name: batch[name][chosen] for name in ("input_ids", "attention_mask", "labels")}
    digests = [d for d, is_of in zip(batch["image_digests"], of_image.tolist(), strict=True) if is_of]
    return {**part, "pixel_values": batch["pixel_values"][of_image], "image_digests": digests}


def _put(stored: Tensor, rows: Tensor, made: Tensor) -> Tensor:
    """Return `stored` 'B H T J' with the blocks of `made`, whose T and J may be smaller, in the rows of bool 'B'."""
    filled = stored.clone()
    filled[rows, :, : made.shape[2], : made.shape[3]] = made
    return filled


def load_recomputed(
    config: Config, *stores: Store, device: torch.device, missing: Mapping[str, Store] | None = None
) -> RecomputedTargets | None:
    """Load the stub for the targets that the config recomputes, and for those `missing` in the store that gives them.

    Returns None if there are none. Raises `FingerprintMismatch` unless its tensors are those of a store's teacher: of
    any store for targets that no store gives, of that very store for what is missing in it.
    """
    targets, missing = config.targets.recomputed(), missing or {}
    lacking = {name: config.targets.active()[name] for name in missing}
    if not targets and not lacking:
        return None
    like = [_vouching(stores, plan_teacher(config.teacher.model, targets=targets))] if targets else []
    for name, store in missing.items():
        check_teacher(store, plan_teacher(config.teacher.model, targets={name: lacking[name]}))
        like.append(store)
    plan = plan_teacher(config.teacher.model, targets=targets | lacking)
    return RecomputedTargets(
        teacher=load_teacher(plan, dtype=_dtype_of(like), device=device),
        targets=targets,
        shares_tower=shares_tower(config),
        vision=TensorCache(config.student.patch_feature_cache_bytes),
        missing=lacking,
    )


def _vouching(stores: Sequence[Store], plan: TeacherPlan) -> Store:
    """Return the first store whose teacher the stub comes from. Raises `FingerprintMismatch` if there is none."""
    for store in stores:
        if not teacher_differences(store, plan):
            return store
    raise FingerprintMismatch(stores[0].path, teacher_differences(stores[0], plan), remedy=REMEDY)


def _dtype_of(stores: Sequence[Store]) -> torch.dtype:
    """Return the dtype in which the stores' teacher computed. Raises `ConfigError` if they differ."""
    dtypes = {str(store.manifest.capture["dtype"]): store.path for store in stores}
    if len(dtypes) > 1:
        (one, path), (other, other_path), *_ = dtypes.items()
        raise ConfigError(
            f"targets would be recomputed as in {path} ({one}) and in {other_path} ({other}), but a stub computes in "
            "one dtype; complete one of the stores with `alignkd teacher-cache`, or set on_missing: skip"
        )
    return getattr(torch, next(iter(dtypes)))


def check_teacher(store: Store, plan: TeacherPlan) -> None:
    """Compare the stub's tensors with the store's teacher, group by group. Raises `FingerprintMismatch`."""
    if differences := teacher_differences(store, plan):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)


def teacher_differences(store: Store, plan: TeacherPlan) -> list[Difference]:
    """Return the groups of the stub's tensors that differ from those of the store's teacher."""
    stored = store.manifest.teacher.get("digests", {})
    return [
        Difference(f"teacher: {group}", stored.get(group, "not looked at by stage 1"), digest)
        for group, digest in plan.digests.items()
        if stored.get(group) != digest
    ]


def shares_tower(config: Config) -> bool:
    """Whether both checkpoints hold the same tower, bit for bit, and read the same layer of it."""
    teacher, student = Checkpoint(config.teacher.model), Checkpoint(config.student.model)
    shapes = [read_config(checkpoint.folder) for checkpoint in (teacher, student)]
    if shapes[0].mm_vision_select_layer != shapes[1].mm_vision_select_layer:
        return False
    names = [
        [n for n in checkpoint.names() if n.startswith(TOWER_PREFIX)] for checkpoint in (teacher, student)
    ]
    return names[0] == names[1] and teacher.digest(names[0]) == student.digest(names[1])
