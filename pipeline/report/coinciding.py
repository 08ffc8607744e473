"""Curves of different variations that lie on each other: which they are, and a sentence about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.report.curves import Curve, Scale

NEAR = 0.005  # of the height of a panel: less than the width of a line


def groups_of(curves: Sequence[Curve], scale: Scale) -> list[list[Curve]]:
    """Return the curves in groups: those of a group lie on each other everywhere."""
    groups: list[list[Curve]] = []
    for curve in curves:
        for group in groups:
            if _coincide(group[0], curve, scale):
                group.append(curve)
                break
        else:
            groups.append([curve])
    return groups


def _coincide(one: Curve, other: Curve, scale: Scale) -> bool:
    if list(one.steps) != list(other.steps):
        return False
    places = zip(map(scale.place, one.values), map(scale.place, other.values), strict=True)
    return all(a == b or abs(a - b) <= NEAR or (math.isnan(a) and math.isnan(b)) for a, b in places)


def sentence(curves: Sequence[Curve], scale: Scale, labels: Mapping[int, str]) -> str:
    """Say which variations coincide, and in how many of their runs; '' if none do. `labels` are by series."""
    runs = Counter(curve.series for curve in curves)
    found: Counter[tuple[int, ...]] = Counter()
    for group in groups_of(curves, scale):
        together = Counter(curve.series for curve in group)
        if len(together) > 1:
            found[tuple(sorted(together))] += max(together.values())
    said: list[str] = []
    for series, count in found.items():
        *first, last = (labels[number] for number in series)
        most = max(runs[number] for number in series)
        of_runs = "" if count >= most else f" in {count} of {most} runs"
        said.append(f"{', '.join(first)} and {last} coincide{of_runs}")
    return "; ".join(said)
