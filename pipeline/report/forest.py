"""The axis of the small plots beside the gains: positions of a gain and its interval, and ticks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from pipeline.evaluation.compare import Gain

WIDTH = 180.0  # pixels
MARGIN = 10.0  # pixels, so that a dot or a number at an end is not cut


@dataclass(frozen=True)
class ForestAxis:
    """Shares from `low` to `high`, zero among them, over `width` pixels; ticks are in points."""

    low: float
    high: float
    ticks: tuple[float, ...]
    width: float = WIDTH

    @classmethod
    def covering(cls, gains: Sequence[Gain]) -> ForestAxis | None:
        """Return the axis of zero and every interval; None without a gain."""
        if not gains:
            return None
        low, high = min(0.0, *(gain.low for gain in gains)), max(0.0, *(gain.high for gain in gains))
        if low == high:
            low, high = -0.01, 0.01  # all gains are zero
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(100 * low, 100 * high)
        return cls(low, high, tuple(float(tick) for tick in ticks if 100 * low <= tick <= 100 * high))

    def place(self, share: float) -> float:
        """Return the position of a share in pixels from the left."""
        part = (share - self.low) / (self.high - self.low)
        return round(MARGIN + part * (self.width - 2 * MARGIN), 1)
