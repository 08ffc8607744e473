"""The two stages of alignkd and the parts they are made of: everything that knows models.

`__all__` is what is public and stays, by `from pipeline import NAME`; docs/python.md describes it.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.config import Config, load_config
    from pipeline.distill.model.distiller import Distiller
    from pipeline.distill.parts import build_distiller, load_student, open_dataset
    from pipeline.errors import ConfigError, JoinError, PipelineError
    from pipeline.twig.decoding.custom_generate import TwigGenerate, generate_with_twig
    from pipeline.twig.decoding.faster import TreeIfFaster
    from pipeline.twig.decoding.tree import Tree
    from pipeline.twig.folder import load_twig

# The client of the Hub would otherwise send what it is used by; nothing here reports home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__all__ = [
    "Config",
    "ConfigError",
    "Distiller",
    "JoinError",
    "PipelineError",
    "Tree",
    "TreeIfFaster",
    "TwigGenerate",
    "build_distiller",
    "generate_with_twig",
    "load_config",
    "load_student",
    "load_twig",
    "open_dataset",
]

_HOMES = {
    "pipeline.config.config": ("Config", "load_config"),
    "pipeline.distill.model.distiller": ("Distiller",),
    "pipeline.distill.parts": ("build_distiller", "load_student", "open_dataset"),
    "pipeline.errors": ("ConfigError", "JoinError", "PipelineError"),
    "pipeline.twig.decoding.custom_generate": ("TwigGenerate", "generate_with_twig"),
    "pipeline.twig.decoding.faster": ("TreeIfFaster",),
    "pipeline.twig.decoding.tree": ("Tree",),
    "pipeline.twig.folder": ("load_twig",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line must not wait for torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'pipeline' has no {name!r}; it gives {', '.join(__all__)}")
