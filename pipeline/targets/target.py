"""The base class of the targets, and what one batch through the teacher gives them to keep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from cache import ArraySpec, Manifest
from pipeline.positions import Counts, Slots
from pipeline.settings import Section

# An array of a sample; of one that depends on the images a list with the block of each image.
Arrays = dict[str, Any]
Source = Literal["cache", "recompute"]


@dataclass(frozen=True)
class TeacherFacts:
    """The teacher's sizes, which the store's manifest carries: stage 2 never opens the teacher."""

    name: str
    num_layers: int
    num_heads: int
    hidden_size: int
    vocab_size: int
    family: str = "mobilevlm"  # transformers' model type; stores of format 1 do not name it
    num_vision_tokens: int | None = None  # of every image; None where it differs from image to image

    @classmethod
    def of(cls, manifest: Manifest) -> TeacherFacts:
        """The facts of the teacher that a store was made with."""
        known = [field.name for field in fields(cls) if field.name in manifest.teacher]
        return cls(**{name: manifest.teacher[name] for name in known})


@dataclass(frozen=True)
class TeacherForward:
    """One batch through the teacher, as far as the targets need it.

    `attention`      layer -> float32 'B H T J'
    `answer_logits`  'A V' at the answer positions, sample after sample; None from a stub
    `num_answers`    answer positions P of each sample
    `sizes`          N of each image of each sample
    `vision`         'N D' of each image to keep
    `keys`           the samples' keys, from which draws are seeded
    `is_real`        bool 'B S', the unpadded positions
    `hidden`         'B S D', the input of a layer of the decoder
    `answer_hidden`  'A D', what the head gets at the answer positions; None from a stub
    `query_attention` float32 'B H J' of the last prompt position, over the vision columns alone
    """

    slots: Slots
    attention: Mapping[int, Tensor]
    answer_logits: Tensor | None
    num_answers: Sequence[int]
    sizes: Sequence[Sequence[int]]
    vision: Sequence[Tensor] = ()
    keys: Sequence[str] = ()
    is_real: Tensor | None = None
    hidden: Tensor | None = None
    answer_hidden: Tensor | None = None
    query_attention: Tensor | None = None


class Target(Section):
    """One kind of teacher output, kept in the store: its settings in the config, and how it is stored and read back.

    Stage 1 calls `arrays` once and `capture` on every batch; stage 2 calls `collate` on what the store returns.
    """

    owner: ClassVar[Literal["sample", "image"]] = "sample"  # whose arrays `capture` returns

    @property
    def is_recomputed(self) -> bool:
        """Whether stage 2 recomputes it."""
        return getattr(self, "source", "cache") == "recompute"

    @classmethod
    def can_be_recomputed(cls) -> bool:
        """Return whether stage 2 can recompute it; logits have no `source` to choose."""
        return "source" in cls.model_fields

    @property
    @abstractmethod
    def deepest(self) -> int | None:
        """The deepest of the layers with attention that it reads; -1 for none, None if it needs the whole model."""

    @property
    def hidden_layer(self) -> int | None:
        """The layer of the decoder whose input it reads, None for none; the number of layers is the last's output."""
        return None

    @property
    @abstractmethod
    def first_array(self) -> str:
        """The name of its first array, whose rows are counted when a sample is read."""

    @abstractmethod
    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        """Return what the store will hold. Raises `ConfigError` if the teacher cannot give it."""

    def of_images(self) -> list[str]:
        """Return the names of its arrays that have a block for each image, of as many columns as that has tokens."""
        return []

    @abstractmethod
    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """Return the arrays of each owner in the batch: of each sample, or of each image in `forward.vision`."""

    @abstractmethod
    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """Return the fields of `TeacherTargets` for a batch, from each sample's stored arrays."""

    @classmethod
    @abstractmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        """Return how many rows of each of its arrays a sample must have, int64 'B'."""

    def rows_in(self, arrays: Arrays) -> int:
        """Return how many rows of each of its arrays a sample has."""
        return len(arrays[self.first_array])

    @abstractmethod
    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        """Return zeros in the shape of a sample's arrays, to be recomputed during training.

        The sample's images have `sizes` vision tokens; `counts` are of the sample alone.
        """
