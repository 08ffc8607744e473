"""Numbers as a page shows them: fixed decimals, so that columns line up, a true minus, '-' for a missing one."""

from __future__ import annotations

NOT_THERE = "-"


def percent(share: float | None, digits: int = 2) -> str:
    """Return a share in percent, without the sign %."""
    return NOT_THERE if share is None else _minus(f"{100 * share:.{digits}f}")


def points(share: float | None) -> str:
    """Return a difference of shares in points, always with its sign."""
    return NOT_THERE if share is None else _minus(f"{100 * share:+.2f}")


def count(number: float | None) -> str:
    """Return a whole number, thousands separated."""
    return decimal(number, 0)


def decimal(number: float | None, digits: int = 1) -> str:
    """Return a number with `digits` decimals, thousands separated."""
    return NOT_THERE if number is None else _minus(f"{number:,.{digits}f}")


def duration(seconds: float | None) -> str:
    """Return milliseconds, seconds, minutes or hours, with three digits."""
    if seconds is None:
        return NOT_THERE
    size = abs(seconds)
    for limit, unit, name in ((0.9995, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if size < limit:
            return _minus(f"{seconds / unit:.3g} {name}")
    return _minus(f"{seconds / 3600:,.0f} h" if size >= 360_000 else f"{seconds / 3600:.3g} h")


def clock(seconds: float | None) -> str:
    """Return h:mm:ss."""
    if seconds is None:
        return NOT_THERE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:,}:{minutes % 60:02d}:{rest:02d}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
