"""The base of every section of the config: frozen, and closed to names that it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config. Losses and targets define theirs beside what they set."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
