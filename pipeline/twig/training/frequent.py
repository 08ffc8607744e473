"""The tokens that answers are made of, by their number in the labels of a training."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from pipeline.distill.join.dataset import JoinedDataset
from pipeline.positions import IGNORE_INDEX

READ_AT_ONCE = 256  # samples


def frequent_labels(dataset: JoinedDataset, most: int) -> Tensor:
    """Return at most `most` ids, int64, ascending: those that occur most often as labels; of equals the smaller ids.

    Reads the labels of every sample of the store, and nothing else.
    """
    counts: Counter[int] = Counter()
    keys, no_arrays = [entry.key for _, entry in dataset.rows], [()] * len(dataset.names)
    for start in range(0, len(keys), READ_AT_ONCE):
        for tokens, _ in dataset.stores.read_many(keys[start : start + READ_AT_ONCE], no_arrays):
            counts.update(label for label in tokens.labels if label != IGNORE_INDEX)
    kept = sorted(counts, key=lambda label: (-counts[label], label))[:most]
    return torch.tensor(sorted(kept))
