"""Twigs of other trainings, by name, that an evaluation compares with its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.twig.evaluation.selectors import KNOWN, LAYER


def parse_beside(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Return name -> folders of twigs, from texts NAME=FOLDER; folders of one name differ in their seeds.

    Raises `ConfigError` for another form, and for the name of a selector.
    """
    named: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, folder = (part.strip() for part in text.partition("="))
        if not (name and equals and folder):
            raise ConfigError(f"--beside {text!r}: NAME=FOLDER was expected, such as distilled=runs/a/twig")
        if name in KNOWN or LAYER.fullmatch(name):
            raise ConfigError(f"--beside {text!r}: {name!r} is the name of a selector; give another one")
        named.setdefault(name, []).append(Path(folder))
    return named
