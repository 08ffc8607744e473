"""The hidden states target: what the first K layers of the teacher give, at every position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cache import ArraySpec
from pipeline.positions import Counts
from pipeline.targets.target import Arrays, Source, Target, TeacherFacts, TeacherForward

HiddenCodec = Literal["bfloat16", "float32"]


class HiddenStatesTarget(Target):
    """Output of the teacher's first layers at every position, which a twig continues.

    Stored as 'S D', a row for each token of the sample, vision tokens included.
    """

    source: Source = "cache"
    """`cache` stores it, `recompute` lets stage 2 recompute it with a stub of the teacher.
    [stage 1, stage 2; store, run]"""
    layer: int = Field(default=2, ge=0)
    """How many layers of the decoder run before it: 0 keeps the embeddings, the number of all layers what the final
    norm gets. [layers; stage 1; store, run]"""
    codec: HiddenCodec = "bfloat16"
    """How it is stored. [stage 1, stage 2; store, run]"""

    @property
    def deepest(self) -> int:
        return -1

    @property
    def hidden_layer(self) -> int:
        return self.layer

    @property
    def first_array(self) -> str:
        return "hidden_states"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        return [ArraySpec("hidden_states", "S D", (facts.hidden_size,), "sample", self.codec, {})]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """float32 'S D' of each sample, without padding."""
        assert forward.hidden is not None and forward.is_real is not None
        lengths = forward.is_real.sum(dim=1).tolist()
        rows = forward.hidden[forward.is_real].cpu().float()
        return [{"hidden_states": of_sample.numpy()} for of_sample in rows.split(lengths)]

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`hidden_states`: float32 'B S D', zeros at the padding on the right."""
        rows = [torch.from_numpy(sample["hidden_states"]) for sample in samples]
        return {"hidden_states": pad_sequence(rows, batch_first=True)}

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        return {"hidden_states": np.zeros((int(counts.positions), facts.hidden_size), np.float32)}

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.positions
