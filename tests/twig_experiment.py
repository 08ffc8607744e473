"""The small experiment with a twig in place of its student: a config, and a store of the base's hidden states."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from small_experiment import Experiment

from pipeline.config.config import to_yaml
from pipeline.teacher_cache.teacher import cache_teacher

# The teacher has three layers.
TWIG = {"attach_layer": 1, "num_layers": 2}
TARGETS = {"hidden_states": {"layer": 1, "codec": "float32"}}


def overrides_of(twig: dict[str, Any], targets: dict[str, Any]) -> list[str]:
    """Return the overrides that put a twig in the place of the student."""
    sections = {
        "student": None,
        "twig": twig,
        "targets": targets,
        "losses": {"supervised": {}},
        "evaluate": None,
    }
    return [f"{name}={yaml.safe_dump(value, default_flow_style=True, width=10**6).split(chr(10))[0]}"
            for name, value in sections.items()]  # fmt: skip


def twig_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    twig: dict[str, Any] = TWIG,
    targets: dict[str, Any] = TARGETS,
    more: Sequence[str] = (),
) -> Experiment:
    """Return an experiment whose config trains a twig, with a base of its own, and its store made by stage 1."""
    made = replace(
        experiment,
        file=folder / "twig.yaml",
        teacher=Path(shutil.copytree(experiment.teacher, folder / "base")),
        store=folder / "twig.zarr",
    )
    places = [f"teacher.model={made.teacher}", f"cache.path={made.store}"]
    config = experiment.config(folder, *overrides_of(twig, targets), *places, *more)
    made.file.write_text(to_yaml(config))
    cache_teacher(config)
    return made
