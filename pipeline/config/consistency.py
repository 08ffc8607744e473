"""What the sections of a config ask of each other."""

from __future__ import annotations

from typing import Any

from pipeline.config.cache_settings import check_named_targets
from pipeline.config.held_out import check_held_out
from pipeline.config.twig_settings import check_twig
from pipeline.losses.losses import LOSSES


def check_consistent(config: Any) -> None:
    """Raise `ValueError` unless the sections of a config go together."""
    check_named_targets(config.caches, config.targets.cached())
    losses = ["supervised"] if config.baseline else list(config.losses.active())
    check_held_out(config.train, losses, has_shards=config.data.held_out_shards is not None)
    if config.twig is not None:
        check_twig(config)
    _check_losses(config)


def _check_losses(config: Any) -> None:
    """Raise `ValueError` unless the losses find their targets."""
    for name, loss in config.losses.active().items():
        if LOSSES[name].only == "twig" and config.twig is None:
            raise ValueError(
                f"losses.{name} trains a twig, and the config has no `twig` section; set losses.{name}: null"
            )
        for target in LOSSES[name].targets:
            if getattr(config.targets, target) is None:
                raise ValueError(
                    f"losses.{name} needs the target {target!r}, which the config does not capture; "
                    f"add `targets.{target}: {{}}` or remove the loss"
                )
        for layer in loss.teacher_layers() if hasattr(loss, "teacher_layers") else ():
            if layer not in (captured := config.targets.active()["attention"].layers):
                raise ValueError(
                    f"losses.{name} reads the teacher's layer {layer}, but targets.attention.layers is "
                    f"{captured}; add the layer there"
                )
    loss, target = config.losses.active().get("attention"), config.targets.active().get("attention")
    if loss and loss.heads == "mix" and target and target.heads != "each":
        raise ValueError(
            "losses.attention.heads: mix needs every teacher head; set targets.attention.heads: each"
        )
