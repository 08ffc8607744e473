"""What differs between a store and what was asked for, field by field, of settings value by value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()
"""Stands for an absent field, whose value could also be None."""


@dataclass(frozen=True)
class Difference:
    """One field in which a store is not what was asked for; `key` is one of the settings inside the field."""

    field: str
    stored: str
    mine: str
    key: str = ""

    def __str__(self) -> str:
        where = f"{self.field}: {self.key}" if self.key else self.field
        return f"{where}: {self.stored or 'none'} -> {self.mine or 'none'}"


def leaf_differences(field: str, stored: Any, mine: Any, key: str = "") -> Iterator[Difference]:
    """Yield the innermost values in which two JSON values of a field differ, by their dotted key."""
    if isinstance(stored, Mapping) and isinstance(mine, Mapping):
        one, other = cast(Mapping[str, Any], stored), cast(Mapping[str, Any], mine)
        for name in sorted(one.keys() | other.keys()):
            inside = f"{key}.{name}" if key else name
            yield from leaf_differences(field, one.get(name, NOTHING), other.get(name, NOTHING), inside)
    elif _spelled(stored) != _spelled(mine):
        yield Difference(field, _spelled(stored), _spelled(mine), key)


def _spelled(value: Any) -> str:
    return "absent" if value is NOTHING else json.dumps(value)
