"""`suggested` in place of a teacher's layer: the number that `alignkd inspect layers` wrote beside the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache as once
from typing import Any

from cache import any_path, read_file
from pipeline.errors import ConfigError

SUGGESTED = "suggested"
SUFFIX = ".layers.json"  # behind the store's path
OF_TEACHER = {"targets": ("attention", "query_attention"), "losses": ("attention", "vision_focus")}
HOW = "run `alignkd inspect layers --config CONFIG`, or give a layer's number"


def suggestion_file(cache_path: str) -> str:
    """Return where the measured layers of a store's teacher are kept."""
    return f"{cache_path.rstrip('/')}{SUFFIX}"


def with_suggested_layers(values: Mapping[str, Any], layer: int | None = None) -> dict[str, Any]:
    """Return a config's values with a number wherever a teacher's layer is `suggested`: `layer`, or the measured one.

    Those are the keys `layer` and `layers` of `targets` and `losses`; of a pair of layers the teacher's is the first.
    Raises `ConfigError` if no layer was measured, or those of another teacher were.
    """

    @once
    def number() -> int:
        return _suggested_layer(values) if layer is None else layer

    made = dict(values)
    for part, names in OF_TEACHER.items():
        if not isinstance(sections := made.get(part), Mapping):
            continue
        filled = {name: _filled(sections[name], number) for name in names if name in sections}
        made[part] = {**sections, **filled}
    return made


def _filled(section: Any, number: Callable[[], int]) -> Any:
    if not isinstance(section, Mapping):
        return section
    filled = dict(section)
    if "layer" in filled:
        filled["layer"] = _replaced(filled["layer"], number)
    if "layers" in filled:
        layers = [SUGGESTED] if filled["layers"] == SUGGESTED else filled["layers"]
        filled["layers"] = _replaced(layers, number)
    return filled


def _replaced(value: Any, number: Callable[[], int]) -> Any:
    if isinstance(value, list):
        return [_replaced(one, number) for one in value]
    return number() if value == SUGGESTED else value


def _suggested_layer(values: Mapping[str, Any]) -> int:
    """Return the layer that was measured for a config's teacher."""
    stores = [values.get("cache"), *(values.get("caches") or ())]
    paths = [str(store["path"]) for store in stores if isinstance(store, Mapping) and "path" in store]
    if not paths:
        raise ConfigError(
            f"a layer is `{SUGGESTED}`, but the config names no store beside which it is kept; {HOW}"
        )
    file = suggestion_file(paths[0])
    if (data := read_file(any_path(file))) is None:
        raise ConfigError(f"a layer is `{SUGGESTED}`, but there is no {file}; {HOW}")
    try:
        record = json.loads(data)
        teacher, layer = record["teacher"], record["suggested"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged; {HOW}") from error
    asked = values.get("teacher")
    asked = asked.get("model") if isinstance(asked, Mapping) else None
    if teacher != asked:
        raise ConfigError(f"{file} suggests a layer of the teacher {teacher}, not of {asked}; {HOW}")
    if not isinstance(layer, int):
        raise ConfigError(
            f"{file} suggests no layer: {record.get('why', 'none looks')}; give a layer's number"
        )
    return layer
