"""URLs without what a server takes for a password: for records that are shared, and for messages that are logged."""

from __future__ import annotations

import re

MASK = "***"
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"\\<>|]+", re.I)
_PASSWORD = re.compile(r"(?<=://)[^/@]*(?=@)")
_QUERY = re.compile(r"\?[^#]*?(?=[.,:;)\]]*(#|$))")  # not the marks of the sentence around it
_VALUE = re.compile(r"=[^&]*")


def without_secrets(text: str) -> str:
    """Return a text whose URLs have no user and password, and no values in their queries: a token may be there."""
    return _URL.sub(_masked, text) if "://" in text else text


def _masked(found: re.Match[str]) -> str:
    url = _PASSWORD.sub(MASK, found[0])
    return _QUERY.sub(_masked_query, url) if url.lower().startswith("http") else url  # else "?" is of a glob


def _masked_query(found: re.Match[str]) -> str:
    return _VALUE.sub(f"={MASK}", found[0]) if "=" in found[0] else f"?{MASK}"
