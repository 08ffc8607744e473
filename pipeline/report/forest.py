"""Where a gain and its interval lie in the little plot beside their numbers, and where its ticks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.compare import Gain

WIDTH = 180.0  # pixels
MARGIN = 10.0  # so that a dot or a number at an end is not cut


@dataclass(frozen=True)
class ForestAxis:
    """Shares from `low` to `high` over `WIDTH` pixels, zero among them; ticks are in points."""

    low: float
    high: float
    ticks: tuple[float, ...]
    width: float = WIDTH

    @classmethod
    def covering(cls, gains: Sequence[Gain]) -> ForestAxis | None:
        """Every interval, and zero; None where there is no gain to draw."""
        if not gains:
            return None
        low, high = min(0.0, *(gain.low for gain in gains)), max(0.0, *(gain.high for gain in gains))
        if low == high:
            low, high = -0.01, 0.01  # one point to each side of gains that are all nothing
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(100 * low, 100 * high)
        return cls(low, high, tuple(float(tick) for tick in ticks if 100 * low <= tick <= 100 * high))

    def place(self, share: float) -> float:
        """Pixels from the left."""
        part = (share - self.low) / (self.high - self.low)
        return round(MARGIN + part * (self.width - 2 * MARGIN), 1)
