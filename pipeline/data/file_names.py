"""File names as people write them: a `~`, accents in either Unicode form, brackets and braces that are no pattern."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """The path with the home folder in place of a leading `~`; `./~` is a folder of that name."""
    return Path(os.path.expanduser(path))


def as_stored(path: Path) -> Path:
    """The path under the name it is stored by, accents composed (NFC) or apart (NFD); as it is if nothing is there.

    macOS and some servers store names decomposed, annotations are mostly composed.
    """
    stored = longest_stored(path)
    return stored if len(stored.parts) == len(path.parts) else path


def longest_stored(path: Path) -> Path:
    """As much of a path, from its start, as is there: ".", "/" or more."""
    found = Path(path.anchor)
    if path.exists():
        return path
    for name in path.parts[len(found.parts) :]:
        forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        stored = next((found / form for form in forms if (found / form).exists()), None)
        if stored is None:
            break
        found = stored
    return found
