"""The concepts that scenes show, read from concepts.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from blake3 import blake3

HELD_OUT_SHARE = 0.15
CONCEPTS = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Concept:
    """One thing that a scene can show: emojibase's label, the name in questions and answers, and its kind."""

    label: str
    name: str
    kind: str

    @property
    def held_out(self) -> bool:
        """Whether no training scene shows it, in any style. The hash of the name decides, so nothing is chosen."""
        share = int.from_bytes(blake3(self.name.encode()).digest(8)) / 2**64
        return share < HELD_OUT_SHARE


def all_concepts() -> tuple[Concept, ...]:
    """Return every concept, kind by kind."""
    kinds: dict[str, list[str]] = yaml.safe_load(CONCEPTS.read_text())
    return tuple(
        Concept(label, name or label, kind)
        for kind, entries in kinds.items()
        for label, _, name in (entry.partition("=") for entry in entries)
    )
