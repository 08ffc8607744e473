"""Numbers for a reader: sizes in bytes, and durations in seconds, minutes or hours."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """Return a size in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_seconds(seconds: float, *, digits: int = 3) -> str:
    """Return a duration in seconds, minutes or hours, rounded to `digits` digits: 119 seconds, 2.5 minutes."""
    name, size = ("second", 1) if seconds < 120 else ("minute", 60) if seconds < 7200 else ("hour", 3600)
    count = float(f"{seconds / size:.{digits}g}")
    return f"{count:,.10g} {name}{'' if count == 1 else 's'}"
