"""The names and shapes of a checkpoint's tensors, compared with those of the model that its config describes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pipeline.models.anatomy import empty_network
from pipeline.models.checkpoint_names import source_names
from pipeline.models.files.checkpoint import Checkpoint

SHOWN = 3
# Buffers that older releases wrote into checkpoints, as transformers leaves them out.
OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def wrong_names(checkpoint: Checkpoint, config: Any) -> list[str]:
    """Return a sentence each about tensors that are missing, unknown or of another shape; none is read."""
    network = empty_network(config)
    expected = network.state_dict()
    tied = set(getattr(network, "all_tied_weights_keys", {}))
    shapes = checkpoint.shapes()
    sources = source_names(network, shapes)
    may_lack, may_have = (
        getattr(network, f"_keys_to_ignore_on_load_{kind}", None) or () for kind in ("missing", "unexpected")
    )
    lacking = _without(expected.keys() - sources.keys() - tied, may_lack)
    others = {
        f"{source} {list(shapes[source])}, not {list(expected[name].shape)}"
        for name, source in sources.items()
        if name in expected and shapes[source] != tuple(expected[name].shape)
    }
    unknown = {source for name, source in sources.items() if name not in expected}
    return [
        *_sentence("lacks", "of the model", lacking),
        *_sentence("has", "that the model does not know", _without(unknown, (*may_have, *OLD_BUFFERS))),
        *_sentence("has", "of another shape than its config asks for", others),
    ]


def _without(names: set[str], patterns: Iterable[str]) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns)}


def _sentence(verb: str, what: str, names: set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(map(repr, sorted(names)[:SHOWN]))
    return [
        f"the checkpoint {verb} {len(names)} tensors {what}: {shown}{', ...' if len(names) > SHOWN else ''}"
    ]
