"""Targets recomputed during training by a stub of the teacher, instead of being read from the store.

`source: recompute` does so for every sample, `on_missing: recompute` for the samples that a store lacks. Attention of
a shallow layer, hidden states behind it and projected vision features need a few percent of the teacher's weights and
no disk; the final hidden states need all of them. Where student
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
from pipeline.distill.join.filling import filled, of_forward
from pipeline.distill.join.memory import BoundedCache
from pipeline.errors import ConfigError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.models.mobilevlm.model import TOWER_PREFIX
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import TeacherPlan, plan_teacher
from pipeline.models.vlm import ImageFeatures
from pipeline.positions import Counts
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
    vision: BoundedCache[HeldFeatures]
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
        made = self._make(wanted, _part_of(batch, chosen), features)
        targets, received = {**batch["targets"]}, {**batch["received"]}
        for name, lacks in lacking.items():
            targets[name] = filled(name, targets[name], made[name], lacks, chosen=chosen, counts=counts)
            received[name] = torch.where(lacks, TARGETS[name].num_rows(counts), received[name])
        return {**batch, "targets": targets, "received": received, "lacking": {}}

    def _make(
        self, targets: Mapping[str, Target], batch: Mapping[str, Any], patch_features: Tensor | None
    ) -> dict[str, Any]:
        """Return the fields of `TeacherTargets` for a batch, of each target its own."""
        vision = self._vision(batch, patch_features)
        fields: dict[str, Any] = {}
        if "vision" in targets and vision is not None:
            fields["vision"] = vision.flat.float()
        if targets.keys() - {"vision"}:
            forward = self.teacher.forward(batch, vision)
            fields |= {
                name: of_forward(target, forward) for name, target in targets.items() if name != "vision"
            }
        return fields

    @torch.no_grad()
    def _vision(self, batch: Mapping[str, Any], patch_features: Tensor | None) -> ImageFeatures | None:
        """Return the teacher's features of a batch's images, each distinct image computed once or held in memory."""
        digests = batch["image_digests"]
        sizes = [size for of_sample in batch["sizes"] for size in of_sample]
        if not digests:
            return None
        if self.shares_tower and patch_features is not None:
            return self.teacher.encode_images((), sizes, patch_features=patch_features)
        found = {digest: held for digest in digests if (held := self.vision.get(digest)) is not None}
        row = {digest: number for number, digest in enumerate(digests)}
        if fresh := [digest for digest in row if digest not in found]:
            images, of_fresh = ([part[row[digest]] for digest in fresh] for part in (batch["images"], sizes))
            made = self.teacher.encode_images(images, of_fresh)
            for number, digest in enumerate(fresh):
                found[digest] = self.vision.put(digest, HeldFeatures.of_one(made, number))
        return ImageFeatures.joined([found[digest].features for digest in digests])


@dataclass(frozen=True)
class HeldFeatures:
    """The features of one image, which know their size in bytes; copies: a view would hold its whole batch."""

    features: ImageFeatures

    @classmethod
    def of_one(cls, images: ImageFeatures, number: int) -> HeldFeatures:
        return cls(images.of([number]).copied())

    @property
    def nbytes(self) -> int:
        return sum(
            t.nbytes for t in (*self.features.tokens, *(t for one in self.features.deepstack for t in one))
        )


def _part_of(batch: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Return the chosen samples, bool 'B', with their images, as far as a stub reads them."""
    part: dict[str, Any] = {
        name: batch[name][chosen] for name in ("input_ids", "attention_mask", "labels", "is_vision")
    }
    is_chosen = chosen.tolist()
    owners = [owner for owner, of_sample in enumerate(batch["sizes"]) for _ in of_sample]
    part["sizes"] = [sizes for sizes, keep in zip(batch["sizes"], is_chosen, strict=True) if keep]
    for name in ("images", "image_digests"):
        part[name] = [one for one, owner in zip(batch[name], owners, strict=True) if is_chosen[owner]]
    return part


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
        vision=BoundedCache(config.student.patch_feature_cache_bytes),
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
    """Whether both checkpoints are MobileVLM V2's with the same tower, bit for bit, and read the same layer of it."""
    teacher, student = Checkpoint(config.teacher.model), Checkpoint(config.student.model)
    shapes = [read_config(checkpoint.folder) for checkpoint in (teacher, student)]
    if not all(isinstance(shape, MobileVLMConfig) for shape in shapes):
        return False
    layers = {shape.mm_vision_select_layer for shape in shapes}
    names = [
        [n for n in checkpoint.names() if n.startswith(TOWER_PREFIX)] for checkpoint in (teacher, student)
    ]
    return len(layers) == 1 and names[0] == names[1] and teacher.digest(names[0]) == student.digest(names[1])
