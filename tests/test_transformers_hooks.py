"""Stage 2 overrides private methods of transformers' Trainer: they are there, and take the arguments that ours take.

What they do is tested by trainings: test_trainer.py, test_resume.py, and with several processes test_scaling.py.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from pipeline.distill.training.trainer import DistillTrainer

PARAMETER = inspect.Parameter
OVERRIDDEN = sorted(
    name
    for name, method in inspect.getmembers(DistillTrainer, inspect.isfunction)
    if hasattr(Trainer, name) and method is not getattr(Trainer, name)
)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_takes_the_trainers_arguments(name):
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(getattr(DistillTrainer, name)).parameters
    takes_any = {p.kind for p in ours.values()} & {PARAMETER.VAR_POSITIONAL, PARAMETER.VAR_KEYWORD}
    assert takes_any or list(ours)[: len(theirs)] == list(theirs)
