"""What a training of a twig made, in a few lines."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.config import Config
from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.models.anatomy import empty_network
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.twig.folder import read_tensors, read_twig_config


def describe_training(config: Config, folder: Path) -> str:
    """Return what lies in `folder`, a twig in the folder of its training: sizes, place and held-out loss."""
    geometry, base = read_twig_config(folder)
    number = sum(tensor.numel() for tensor in read_tensors(folder).values())
    network = empty_network(read_config(checkpoint_folder(config.teacher.model)))
    of_base = sum(parameter.numel() for parameter in network.parameters())
    first, last = geometry.attach_layer, geometry.attach_layer + geometry.num_layers
    lines = [
        f"{folder}: {_millions(number)} M parameters, {number / of_base:.1%} of the base's {_millions(of_base)} M",
        f"{geometry.num_layers} layers on the output of base layer {first} of {geometry.num_base_layers}, as deep as "
        f"base layer {last}; its base is {base.name} ({base.digest[:12]})",
    ]
    if (loss := _held_out_loss(folder.parent)) is not None:
        lines.append(f"held-out loss: {loss:.4g}")
    return "\n".join(lines)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.3g}" if number < 1e8 else f"{number / 1e6:,.0f}"


def _held_out_loss(run: Path) -> float | None:
    """Return the last held-out loss of a training; None if there is none."""
    history = json.loads((run / STATE_FILE).read_text())["log_history"]
    return next((entry["eval_loss"] for entry in reversed(history) if "eval_loss" in entry), None)
