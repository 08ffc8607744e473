"""Paths as people write them: a leading `~`, and accents in either Unicode form."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """Return the path with the home folder for a leading `~`; `./~` is a folder of that name."""
    return Path(os.path.expanduser(path))


def as_stored(path: Path) -> Path:
    """Return the path by its stored name, with accents composed (NFC) or decomposed (NFD); unchanged if not there.

    macOS and some servers store decomposed names; annotations mostly use composed ones.
    """
    stored = longest_stored(path)
    return stored if len(stored.parts) == len(path.parts) else path


def longest_stored(path: Path) -> Path:
    """Return the longest part of a path, from its start, that exists: ".", "/" or more."""
    if path.exists():
        return path
    found = Path(path.anchor)
    for name in path.parts[len(found.parts) :]:
        forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        stored = next((found / form for form in forms if (found / form).exists()), None)
        if stored is None:
            break
        found = stored
    return found
