"""The base class of the targets, and what one batch through the teacher gives them to keep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from cache import ArraySpec, Manifest
from pipeline.positions import Counts, Slots
from pipeline.settings import Section

Arrays = dict[str, np.ndarray]
Source = Literal["cache", "recompute"]


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher's sizes, which the store's manifest carries: stage 2 never opens the teacher."""

    name: str
    num_layers: int
    num_heads: int
    hidden_size: int
    num_vision_tokens: int
    vocab_size: int

    @classmethod
    def of(cls, manifest: Manifest) -> TeacherFacts:
        """The facts of the teacher that a store was made with."""
        return cls(**{field.name: manifest.teacher[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class TeacherForward:
    """One batch through the teacher, as far as the targets need it.

    `attention`      layer -> float32 'B H T J'
    `answer_logits`  'A V' at the answer positions, sample after sample; None from a stub
    `num_answers`    answer positions P of each sample
    `vision`         'I N D', projected features of the images to keep; None without images
    `keys`           the samples' keys, from which draws are seeded
    """

    slots: Slots
    attention: Mapping[int, Tensor]
    answer_logits: Tensor | None
    num_answers: Sequence[int]
    num_vision_tokens: int
    vision: Tensor | None = None
    keys: Sequence[str] = ()


class Target(Section):
    """One kind of teacher output, kept in the store: its settings in the config, and how it is stored and read back.

    Stage 1 calls `arrays` once and `capture` on every batch; stage 2 calls `collate` on what the store returns.
    """

    owner: ClassVar[Literal["sample", "image"]] = "sample"  # whose arrays `capture` returns

    @property
    def is_recomputed(self) -> bool:
        """Whether stage 2 recomputes it; logits need the whole teacher, so they have no `source` to choose."""
        return getattr(self, "source", "cache") == "recompute"

    @property
    @abstractmethod
    def deepest(self) -> int | None:
        """The deepest decoder layer whose input it reads; -1 for none, None if it needs the whole model."""

    @property
    @abstractmethod
    def first_array(self) -> str:
        """The name of its first array, whose rows are counted when a sample is read."""

    @abstractmethod
    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        """Return what the store will hold. Raises `ConfigError` if the teacher cannot give it."""

    @abstractmethod
    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """Return the arrays of each owner in the batch: of each sample, or of each image in `forward.vision`."""

    @abstractmethod
    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """Return the fields of `TeacherTargets` for a batch, from each sample's stored arrays and `num_images`."""

    @classmethod
    @abstractmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        """Return how many rows of each of its arrays a sample must have, int64 'B'."""

    def blank(self, facts: TeacherFacts, num_rows: int) -> Arrays:
        """Return zeros in the shape of a sample's arrays, to be recomputed during training."""
        shapes = {spec.name: spec.shape_of(facts.num_vision_tokens) for spec in self.arrays(facts)}
        return {name: np.zeros((num_rows, *shape), np.float32) for name, shape in shapes.items()}
