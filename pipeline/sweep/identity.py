"""The identity of a sweep's run: runs of equal identity differ in machine, threads and versions at most."""

from __future__ import annotations

from functools import cache as once
from typing import Any

from cache import Store, digest_of
from pipeline.config.config import Config, EvaluateConfig
from pipeline.config.training_arguments import samples_per_step
from pipeline.distill.training.processes import num_processes
from pipeline.distill.training.run_identity import settings_of_weights
from pipeline.evaluation.scores import held_out_digests
from pipeline.models.files.checkpoint import Checkpoint


def run_identity(config: Config) -> str:
    """Return a digest of everything that a run's accuracy depends on."""
    assert config.evaluate is not None
    return digest_of([
        settings_of_weights(config),
        samples_per_step(config.train, num_processes()),
        config.evaluate.model_dump(mode="json", exclude={"batch_size", "metrics"}),
        _stores_identity(config),
        _weights_identity(config.student.model),
        _questions_identity(config.evaluate.model_dump_json()),
    ])  # fmt: skip


def _stores_identity(config: Config) -> list[Any]:
    if config.caches is None:
        return _store_identity(config.one_cache.path)
    # With several teachers the stub is made of `teacher.model`.
    stub = config.teacher.model if config.targets.recomputed() else None
    stores = [[_store_identity(cache.path), cache.targets] for cache in config.caches]
    return [stub, config.on_missing, stores]


# A sweep has many runs of few stores, models and test sets: each is read once.
@once
def _store_identity(path: str) -> list[Any]:
    store = Store(path)
    return [store.manifest.fingerprint.to_json(), list(store.parts)]


@once
def _weights_identity(model: str) -> str:
    return Checkpoint(model).digest()


@once
def _questions_identity(evaluate: str) -> list[tuple[str, str]]:
    return held_out_digests(EvaluateConfig.model_validate_json(evaluate))
