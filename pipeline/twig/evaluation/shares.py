"""Shares of vision tokens, as exact fractions."""

from __future__ import annotations

from fractions import Fraction

from pipeline.errors import ConfigError


def parse_shares(text: str) -> list[Fraction]:
    """Return the shares of a list such as `1/3,2/9,1/9`. Raises `ConfigError` for what is no share from 0 to 1."""
    shares: dict[Fraction, None] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            share = Fraction(part)
        except (ValueError, ZeroDivisionError):
            share = Fraction(-1)
        if not 0 < share <= 1:
            raise ConfigError(f"keep: a share such as 1/9 or 0.1 was expected, found {part!r}")
        shares[share] = None
    if not shares:
        raise ConfigError("keep: no share asked for; name some, such as 1/3,2/9,1/9")
    return list(shares)
