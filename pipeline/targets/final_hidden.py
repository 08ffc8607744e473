"""The final hidden target: what the teacher's head gets at the answer positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import ArraySpec
from pipeline.positions import Counts
from pipeline.targets.hidden_states import HiddenCodec
from pipeline.targets.target import Arrays, Source, Target, TeacherFacts, TeacherForward


class FinalHiddenTarget(Target):
    """The teacher's last hidden states, after its final norm, at the positions that predict answer tokens.

    With the teacher's head they give the logits of the whole vocabulary. Stored as 'P D'.
    """

    source: Source = "cache"
    """`cache` stores it, `recompute` lets stage 2 recompute it, with the whole teacher in memory.
    [stage 1, stage 2; store, run]"""
    codec: HiddenCodec = "bfloat16"
    """How it is stored. [stage 1, stage 2; store, run]"""

    @property
    def deepest(self) -> None:
        return None

    @property
    def first_array(self) -> str:
        return "final_hidden"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        return [ArraySpec("final_hidden", "P D", (facts.hidden_size,), "sample", self.codec, {})]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """float32 'P D' of each sample."""
        assert forward.answer_hidden is not None
        rows = forward.answer_hidden.cpu().float().split(list(forward.num_answers))
        return [{"final_hidden": of_sample.numpy()} for of_sample in rows]

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """`final_hidden`: float32 'A D', sample after sample."""
        return {
            "final_hidden": torch.from_numpy(np.concatenate([sample["final_hidden"] for sample in samples]))
        }

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        return {"final_hidden": np.zeros((int(counts.answers), facts.hidden_size), np.float32)}

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.answers
