"""The names of a model's tensors in its checkpoint: older checkpoints of many families have other ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from pipeline.errors import ConfigError


def source_names(network: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the model's name -> the checkpoint's, of every tensor of a checkpoint, as transformers renames them.

    `network` needs no weights. Raises `ConfigError` for a tensor that transformers makes of others, such as a mixture
    of experts.
    """
    state = network.state_dict()
    transforms = get_model_conversion_mapping(network)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    found: dict[str, str] = {}
    for name in names:
        renamed, converter = rename_source_key(name, renamings, converters, network.base_model_prefix, state)
        if converter is not None:
            raise ConfigError(
                f"the checkpoint's tensor {name!r} is not read as it is: transformers joins, splits or "
                f"transposes such tensors to make {renamed!r}, but a stub reads single tensors; use another family"
            )
        found[renamed] = name
    return found
