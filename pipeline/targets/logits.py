"""The logits target: the teacher's next-token distribution at the answer positions, most of it in a few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cache import ArraySpec
from pipeline.errors import ConfigError
from pipeline.positions import Counts
from pipeline.targets.tail_draws import draw_tail
from pipeline.targets.target import Arrays, Target, TeacherFacts, TeacherForward
from pipeline.targets.vocabulary import SMALLEST_LOG_PROBABILITY, with_tail

# Field of `TeacherTargets` -> array of the store.
_STORED = {
    "top_ids": "logits/ids",
    "top_log_probs": "logits/log_probs",
    "tail_log_prob": "logits/tail",
    "draw_ids": "logits/draw_ids",
    "draw_log_probs": "logits/draw_log_probs",
}


class LogitsTarget(Target):
    """The teacher's largest log probabilities at answer positions, and the mass of the rest."""

    top_k: int = Field(default=32, ge=1)
    """How many of the most probable tokens are kept. [tokens; stage 1, stage 2; store, run]"""
    tail_samples: int = Field(default=0, ge=0, exclude_if=lambda samples: samples == 0)
    """Tokens drawn at random from the rest of each position. [draws; stage 1, stage 2; store, run]"""

    @property
    def deepest(self) -> None:
        return None

    @property
    def first_array(self) -> str:
        return "logits/ids"

    def arrays(self, facts: TeacherFacts) -> list[ArraySpec]:
        top_k = min(self.top_k, facts.vocab_size)
        id_type = {"dtype": "uint16" if facts.vocab_size <= 2**16 else "int32"}
        specs = [
            ArraySpec("logits/ids", "P K", (top_k,), "sample", "integer", id_type),
            ArraySpec("logits/log_probs", "P K", (top_k,), "sample", "float16", {}),
            ArraySpec("logits/tail", "P", (), "sample", "float16", {}),
        ]
        if self.tail_samples == 0:
            return specs
        if top_k == facts.vocab_size:
            raise ConfigError(
                f"targets.logits.tail_samples asks for {self.tail_samples} draws outside the top {top_k}, but that "
                "is the whole vocabulary; set it to 0, or top_k lower"
            )
        shape = (self.tail_samples,)
        return [
            *specs,
            ArraySpec("logits/draw_ids", "P Z", shape, "sample", "integer", id_type),
            ArraySpec("logits/draw_log_probs", "P Z", shape, "sample", "float16", {}),
        ]

    def capture(self, forward: TeacherForward) -> list[Arrays]:
        """Ids 'P K', log probabilities 'P K' (descending), log of the remaining mass 'P', draws 'P Z'."""
        logits, num_answers = forward.answer_logits, list(forward.num_answers)
        assert logits is not None
        ids = logits.topk(min(self.top_k, logits.shape[1]), dim=-1).indices
        top, tail = with_tail(logits, ids)
        kept = {"logits/ids": ids, "logits/log_probs": top, "logits/tail": tail}
        if self.tail_samples:
            log_probs = logits.float().log_softmax(dim=-1)
            draws = draw_tail(
                log_probs, ids, keys=forward.keys, num_answers=num_answers, num_draws=self.tail_samples
            )
            kept |= {"logits/draw_ids": draws, "logits/draw_log_probs": log_probs.gather(1, draws)}
        parts = {name: _finite(values).cpu().split(num_answers) for name, values in kept.items()}
        return [{name: parts[name][i].numpy() for name in kept} for i in range(len(num_answers))]

    def collate(self, samples: Sequence[Arrays]) -> dict[str, Any]:
        """int64 ids 'A K' and 'A Z', float32 log probabilities; draws only where there are any."""
        fields: dict[str, Any] = {}
        for field, name in _STORED.items():
            if self.tail_samples or "draw" not in field:
                values = torch.from_numpy(np.concatenate([sample[name] for sample in samples]))
                fields[field] = values if values.is_floating_point() else values.long()
        return fields

    def blank(self, facts: TeacherFacts, sizes: Sequence[int], counts: Counts) -> Arrays:
        raise ConfigError(
            "logits cannot be recomputed by a stub; complete the store, or set on_missing: skip"
        )

    @classmethod
    def num_rows(cls, counts: Counts) -> Tensor:
        return counts.answers


def _finite(values: Tensor) -> Tensor:
    """Clamp log probabilities: below e^-30 one carries no information, and -inf would fail the store's checks."""
    return values.clamp(min=SMALLEST_LOG_PROBABILITY) if values.is_floating_point() else values
