"""What a run of a sweep was made from: of equal identities only machine, threads and versions may differ."""

from __future__ import annotations

from functools import cache as once
from typing import Any

from cache import Store, digest_of
from pipeline.config.config import Config, EvaluateConfig
from pipeline.config.training_arguments import OF_THE_LOG
from pipeline.evaluation.scores import held_out_digests
from pipeline.models.checkpoint import Checkpoint


def run_identity(config: Config) -> str:
    """Everything that a run's accuracy depends on."""
    settings = config.model_dump(mode="json", include={"data", "student", "losses", "train", "targets"})
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in OF_THE_LOG}
    assert config.evaluate is not None
    answers = config.evaluate.model_dump(mode="json", exclude={"batch_size"})
    ground = [_stores_identity(config), _weights_identity(config.student.model)]
    questions = _questions_identity(config.evaluate.model_dump_json())
    return digest_of([settings, answers, ground, questions])


def _stores_identity(config: Config) -> list[Any]:
    if config.caches is None:
        return _store_identity(config.one_cache.path)
    stub = config.teacher.model if config.targets.recomputed() else None  # of several teachers this one
    return [
        stub,
        config.on_missing,
        [[_store_identity(cache.path), cache.targets] for cache in config.caches],
    ]


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
