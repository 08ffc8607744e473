"""The table of targets: everything that can be kept of a teacher, by its name in the config."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.targets.attention import AttentionTarget
from pipeline.targets.final_hidden import FinalHiddenTarget
from pipeline.targets.hidden_states import HiddenStatesTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.query_attention import QueryAttentionTarget
from pipeline.targets.target import Target
from pipeline.targets.vision import VisionTarget

TARGETS: dict[str, type[Target]] = {
    "attention": AttentionTarget,
    "vision": VisionTarget,
    "logits": LogitsTarget,
    "hidden_states": HiddenStatesTarget,
    "final_hidden": FinalHiddenTarget,
    "query_attention": QueryAttentionTarget,
}


def deepest_layer(targets: Mapping[str, Target]) -> int | None:
    """Return the deepest decoder layer that the targets read; -1 if none, None if one needs the whole model."""
    depths = [target.deepest for target in targets.values()]
    return None if None in depths else max((depth for depth in depths if depth is not None), default=-1)


def hidden_layer(targets: Mapping[str, Target]) -> int | None:
    """Return the layer of the decoder whose input the targets read; None if none does."""
    return next((layer for target in targets.values() if (layer := target.hidden_layer) is not None), None)
