"""YAML in which 1e-3 is a number, and `no`, `on` and the like are strings."""

from __future__ import annotations

import re
from typing import Any

import yaml

BOOL = "tag:yaml.org,2002:bool"
# Booleans in YAML 1.1. Some fields take them as words (save_strategy: no), so the type of the field decides.
YES_OR_NO = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, where YAML 1.1 reads a string; true and false alone as booleans."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a string that looks like 1e-3 in quotes."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(text: str) -> Any:
    """Return the values of a YAML text, with 1e-3 as a number and `no` as a string."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def write_yaml(values: Any) -> str:
    """Return a YAML text that `read_yaml` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def yes_or_no(value: Any) -> Any:
    """Return the boolean that YAML 1.1 reads in a word such as `on` or `No`; any other value unchanged."""
    return YES_OR_NO.get(value.lower(), value) if isinstance(value, str) else value
