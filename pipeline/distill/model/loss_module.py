"""What is trained as one module with its losses and trained heads, whose forward returns every loss term."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distill.join.dataset import Refused
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import JoinError
from pipeline.losses.inputs import StudentOutputs, TeacherTargets
from pipeline.losses.losses import LOSSES
from pipeline.positions import Counts
from pipeline.shapes import expect_shape
from pipeline.targets.targets import TARGETS

# Loss -> its sum, float32, and its count in a batch.
Terms = dict[str, tuple[Tensor, Tensor]]

# A batch and the tower's features of its images -> the batch with the targets that no store gave.
Recompute = Callable[[Mapping[str, Any], Tensor | None], Mapping[str, Any]]


class LossModule(nn.Module):
    """A model with its losses. The trained heads are parameters of this module, never of the model.

    A class of it registers the model before `heads`: resumed optimizers rely on the order of the parameters.
    """

    heads: nn.ModuleDict
    observed: Sequence[str] = ()  # what is logged beside the losses, in the order of `observations`

    def __init__(
        self,
        losses: Mapping[str, Any],
        *,
        patch_feature_cache_bytes: int = 0,
        recompute: Recompute | None = None,
    ):
        super().__init__()
        self.losses = dict(losses)
        self.patch_feature_cache = TensorCache(patch_feature_cache_bytes)
        self.progress = 0.0  # the part of the training that is done, which the trainer sets
        self.recompute = recompute  # no module, so nothing of a teacher is trained or saved

    def forward(self, batch: Mapping[str, Any]) -> Terms:
        """Return every loss term of a batch of `JoinCollator`, and what is observed beside them.

        Raises `JoinError` if rows of a target are missing.
        """
        Refused.check(batch)
        patch_features = self.patch_features(batch)
        if self.recompute:
            batch = self.recompute(batch, patch_features)
        check_num_rows(batch)
        teacher = TeacherTargets(**batch["targets"])
        mine = self.outputs(batch, patch_features, teacher)
        shape = {"T": mine.slots.text.shape[1], "J": mine.slots.vision.shape[1]}
        for layer, attention in teacher.attention.items():
            expect_shape(f"stored attention of layer {layer}", attention, "B H T J", shape)
        # Heads and losses are float32 under `train.bf16` too: they are small, and KL is a difference of like numbers.
        with torch.autocast(mine.slots.text.device.type, enabled=False):
            terms = {
                name: LOSSES[name].compute(mine, teacher, self.head_of(name), settings)
                for name, settings in self.losses.items()
            }
        return terms | self.observations(mine)

    def observations(self, mine: StudentOutputs) -> Terms:
        """Return what is logged beside the losses, a sum and a count each."""
        return {}

    @abstractmethod
    def outputs(
        self, batch: Mapping[str, Any], patch_features: Tensor | None, teacher: TeacherTargets
    ) -> StudentOutputs:
        """Run the model on a batch whose targets are complete."""

    def patch_features(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the frozen tower's features 'I M W' of the batch's images; None without such a tower."""
        return None

    def of_images(self) -> list[nn.Parameter]:
        """Return the trained parameters that a batch without an image gives no gradient in one process."""
        return []

    def total(self, terms: Terms) -> Tensor:
        """Return the loss of one batch, a float32 scalar: the weighted sum of each term's mean."""
        means = {name: terms[name][0] / terms[name][1].clamp(min=1) for name in self.losses}
        return torch.stack([self.losses[name].weight * mean for name, mean in means.items()]).sum()

    def head_of(self, loss: str) -> nn.Module | None:
        """Return the head that a loss shares, if there is one."""
        kind = LOSSES[loss].head
        return self.heads[kind] if kind is not None and kind in self.heads else None


def check_num_rows(batch: Mapping[str, Any]) -> None:
    """Raise `JoinError` unless every sample has as many rows of every target as its own tokens ask for."""
    counts = Counts.of(batch)
    for name, found in batch["received"].items():
        expected = TARGETS[name].num_rows(counts)
        if bool((wrong := found != expected).any()):
            at = int(wrong.nonzero()[0, 0])
            raise JoinError(
                f"sample {at} of the batch needs {int(expected[at])} rows of the target {name!r} and received "
                f"{int(found[at])}; run `alignkd verify` on the store"
            )
