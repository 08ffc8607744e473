"""What differs between a store and what was asked for: fields, and of settings the values alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()
"""What a SchemaError found where a field is absent."""


@dataclass(frozen=True)
class Difference:
    """One field in which a store is not what was asked for; of a field with settings inside, one `key` of it."""

    field: str
    stored: str
    mine: str
    key: str = ""

    def __str__(self) -> str:
        where = f"{self.field}: {self.key}" if self.key else self.field
        return f"{where}: {self.stored or 'none'} -> {self.mine or 'none'}"


def leaf_differences(stored: Any, mine: Any, *, at: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, stored, mine) of the values alone in which two JSON values differ, as JSON, or `absent`."""
    if isinstance(stored, Mapping) and isinstance(mine, Mapping):
        one, other = cast(Mapping[str, Any], stored), cast(Mapping[str, Any], mine)
        for name in sorted(one.keys() | other.keys()):
            inside = f"{at}.{name}" if at else name
            yield from leaf_differences(one.get(name, NOTHING), other.get(name, NOTHING), at=inside)
        return
    theirs, ours = _spelled(stored), _spelled(mine)
    if theirs != ours:
        yield at, theirs, ours


def _spelled(value: Any) -> str:
    return "absent" if value is NOTHING else json.dumps(value)
