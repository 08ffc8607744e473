"""The names and shapes of a checkpoint's tensors, compared with those of the model that its config describes."""

from __future__ import annotations

import re
from typing import Any

from pipeline.models.anatomy import empty_network
from pipeline.models.checkpoint_names import source_names
from pipeline.models.files.checkpoint import Checkpoint

SHOWN = 3


def wrong_names(checkpoint: Checkpoint, config: Any) -> list[str]:
    """Return a sentence each about tensors that are missing, unknown or of another shape; none is read."""
    network = empty_network(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tied = set(getattr(network, "all_tied_weights_keys", {}))
    sources = source_names(config, checkpoint.names())
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or []
    return [
        *_sentence("lacks", "of the model", expected.keys() - sources.keys() - tied),
        *_sentence("has", "that the model does not know", _unknown(sources, expected, ignored)),
    ]


def _unknown(sources: dict[str, str], expected: Any, ignored: list[str]) -> set[str]:
    unknown = {source for name, source in sources.items() if name not in expected}
    return {name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)}


def _sentence(verb: str, what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(map(repr, sorted(names)[:SHOWN]))
    return [
        f"the checkpoint {verb} {len(names)} tensors {what}: {shown}{', ...' if len(names) > SHOWN else ''}"
    ]
