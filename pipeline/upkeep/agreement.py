"""How often the teacher agrees with the labels, from stored logits: a poor teacher is seen before a training.

Without torch, for `alignkd info`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cache import Store
from pipeline.errors import PipelineError

SAMPLES = 256  # a share of a few thousand tokens is known to about a point
SEED = 0
IGNORED = -100  # pipeline.positions.IGNORE_INDEX, which would import torch
READ = ("labels", "logits/ids", "logits/log_probs", "logits/tail")
DRAWS = ("logits/draw_ids", "logits/draw_log_probs")
# A teacher that fits its data is right about most tokens, since the later ones of a word or phrase are nearly sure.
# Below a half it would pull most tokens of the answers away from the labels.
POOR = 0.5


@dataclass(frozen=True)
class Agreement:
    """The teacher's stored logits and the labels, over the answer tokens of some samples.

    `top1` is the share of tokens whose likeliest stored id is the label. `log_prob` is the mean log probability of
    the label, in nats: exact, to the rounding of float16, for the share `known` of tokens, whose label is among the
    stored ids. For the others it counts the most that the label can have, so that the mean is an upper bound.
    """

    samples: int
    of_samples: int
    seed: int
    tokens: int
    top1: float
    log_prob: float
    known: float

    @property
    def is_poor(self) -> bool:
        return self.top1 < POOR

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_poor": self.is_poor}

    def __str__(self) -> str:
        which = "all" if self.samples == self.of_samples else f"drawn with seed {self.seed} from"
        bound = "" if self.known == 1 else f"at most, exact for {100 * self.known:.1f}% of them; "
        return (
            f"the teacher's first choice is the label at {100 * self.top1:.1f}% of {self.tokens:,} answer tokens; "
            f"mean log probability of the label {self.log_prob:.3f} ({bound}{self.samples:,} samples, {which} "
            f"{self.of_samples:,})"
        )

    @property
    def warning(self) -> str:
        """What to do about a poor teacher; "" about another."""
        if not self.is_poor:
            return ""
        return (
            f"WARNING: the teacher agrees with the labels at {100 * self.top1:.1f}% of the answer tokens, less than "
            f"{100 * POOR:.0f}%: a student would learn its mistakes; compare data.template with the teacher's own, "
            "look at samples with `alignkd inspect`, and measure the teacher with `alignkd evaluate`"
        )


def agreement_in(store: Store, *, num_samples: int | None = SAMPLES, seed: int = SEED) -> Agreement | None:
    """Compare the logits of some samples, drawn by `seed`, or of all; None without logits or answer tokens.

    Reads the labels and the logits of these samples alone.
    """
    if not set(READ) <= set(store.manifest.specs):
        return None
    names = [*READ, *(name for name in DRAWS if name in store.manifest.specs)]
    total = sum(store.num_samples(part) for part in store.parts)
    keys = _keys(store, total, num_samples, seed)
    found = [_of_sample(key, arrays) for key, arrays in zip(keys, store.read_many(keys, names), strict=True)]
    if not sum(len(rows) for rows in found):
        return None
    is_first, log_probs, is_known = np.concatenate(found).T
    means = (float(column.mean()) for column in (is_first, log_probs, is_known))
    return Agreement(len(keys), total, seed, len(is_first), *means)


def _keys(store: Store, total: int, num_samples: int | None, seed: int) -> list[str]:
    """Return the keys of the chosen samples, in the store's order."""
    if num_samples is None or num_samples >= total:
        return [key for part in store.parts for key in store.keys_of(part)]
    chosen = np.sort(np.random.default_rng(seed).choice(total, num_samples, replace=False))
    return list(_at(store, chosen))


def _at(store: Store, numbers: np.ndarray) -> Iterator[str]:
    first = 0
    for part in store.parts:
        end = first + store.num_samples(part)
        for number in numbers[(numbers >= first) & (numbers < end)].tolist():
            yield store.entry(part, number - first).key
        first = end


def _of_sample(key: str, arrays: dict[str, Any]) -> np.ndarray:
    """Return for each answer token: whether the first id is the label, its log probability, whether that is exact."""
    labels = arrays["labels"][1:]
    labels = labels[labels != IGNORED][:, None]
    ids, log_probs = arrays["logits/ids"], arrays["logits/log_probs"].astype(np.float64)
    if len(ids) != len(labels):
        raise PipelineError(
            f"sample {key!r} has {len(labels)} answer tokens and {len(ids)} rows of logits; run `alignkd verify` on "
            "the store"
        )
    # What is outside the top K is no likelier than its last id, nor than all that is outside together.
    most = np.minimum(arrays["logits/tail"].astype(np.float64), log_probs[:, -1])
    is_first = ids[:, 0] == labels[:, 0]
    if "logits/draw_ids" in arrays:
        ids = np.concatenate([ids, arrays["logits/draw_ids"]], axis=1)
        log_probs = np.concatenate([log_probs, arrays["logits/draw_log_probs"].astype(np.float64)], axis=1)
    is_label = ids == labels
    is_known = is_label.any(axis=1)
    of_label = np.where(is_known, log_probs[np.arange(len(ids)), is_label.argmax(axis=1)], most)
    return np.stack([is_first, of_label, is_known], axis=1).astype(np.float64)
