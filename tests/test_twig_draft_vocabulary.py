"""A twig that drafts the tokens alone that answers are made of."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from twig_experiment import TWIG, twig_experiment

from cache import Store
from pipeline.models.loading import load_network
from pipeline.positions import IGNORE_INDEX
from pipeline.twig.folder import load_twig
from pipeline.twig.training.train import train_twig, twig_job

pytestmark = pytest.mark.slow


def labels_of(store: Store) -> list[int]:
    """All labels of a store, by its own reader."""
    keys = [entry.key for part in store.parts for entry in store.entries(part)]
    return [
        int(label) for key in keys for label in store.read(key, ["labels"])["labels"] if label != IGNORE_INDEX
    ]


def test_the_most_frequent_labels_are_saved_with_the_twig(experiment, tmp_path):
    made = twig_experiment(experiment, tmp_path, twig=TWIG | {"draft_vocabulary": 4})
    config = made.config(tmp_path, "train.max_steps=2", "train.save_steps=1", "train.save_strategy=steps")
    folder = train_twig(config, tmp_path / "run")
    counts = Counter(labels_of(Store(made.store)))
    assert len(counts) > 4
    expected = sorted(sorted(counts, key=lambda label: (-counts[label], label))[:4])
    twig = load_twig(folder, load_network(str(made.teacher), dtype=torch.float32))
    assert twig.draft_ids is not None and twig.draft_ids.tolist() == expected
    assert twig.draft_logits(torch.zeros(1, 1, twig.norm.weight.shape[0])).shape[-1] == 4


def test_a_training_with_a_draft_vocabulary_resumes(experiment, tmp_path):
    made = twig_experiment(experiment, tmp_path, twig=TWIG | {"draft_vocabulary": 4})
    steps = ["train.save_steps=1", "train.save_strategy=steps", "train.lr_scheduler_type=constant"]
    train_twig(made.config(tmp_path, *steps, "train.max_steps=1"), tmp_path / "run")
    more = made.config(tmp_path, *steps, "train.max_steps=2", "train.resume_from_checkpoint=true")
    train_twig(more, tmp_path / "run")
    whole = train_twig(made.config(tmp_path, *steps, "train.max_steps=2"), tmp_path / "whole")
    network = load_network(str(made.teacher), dtype=torch.float32)
    resumed, straight = (
        load_twig(place, network).state_dict() for place in (tmp_path / "run" / "twig", whole)
    )
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_all_labels_are_kept_where_there_are_fewer(experiment, tmp_path):
    made = twig_experiment(experiment, tmp_path, twig=TWIG | {"draft_vocabulary": 100_000})
    job = twig_job(made.config(tmp_path))
    assert job.trained.draft_ids.tolist() == sorted(set(labels_of(Store(made.store))))
