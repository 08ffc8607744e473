"""Where in its data a run is: steps, epoch, and the sample of the epoch's order. Every checkpoint keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DataPosition:
    """After `step` optimizer steps a run has read the first `sample` samples of the order of epoch `epoch`, from 0.

    The steps of an epoch end at the multiples of `samples_per_step`, and at the epoch's end. A position within a
    step, left by a run whose steps were of another length, makes the next step a short one.
    """

    samples_per_step: int
    step: int = 0
    epoch: int = 0
    sample: int = 0
    samples_seen: int = 0  # as it is logged: the short last step of an epoch counts as a full one

    @property
    def steps_into_epoch(self) -> int:
        """Whole steps of this length that are behind in this epoch."""
        return self.sample // self.samples_per_step

    def after_step(self, samples_an_epoch: int) -> DataPosition:
        """Where the next step ends."""
        end = (self.steps_into_epoch + 1) * self.samples_per_step
        seen = self.samples_seen + end - self.sample
        return replace(self, step=self.step + 1, sample=end, samples_seen=seen)._within(samples_an_epoch)

    def in_steps_of(self, samples_per_step: int, samples_an_epoch: int) -> DataPosition:
        """The same place in the data, for steps of another length."""
        return replace(self, samples_per_step=samples_per_step)._within(samples_an_epoch)

    def _within(self, samples_an_epoch: int) -> DataPosition:
        return self if self.sample < samples_an_epoch else replace(self, epoch=self.epoch + 1, sample=0)
