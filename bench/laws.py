"""Laws of growth: cost = a + b x + c x^2, fitted to what was measured, and held to a size that it did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Law:
    """A sum of powers of one size, each with a coefficient that is not negative.

    `residual` is the largest of the relative errors at the sizes that it was fitted to.
    """

    powers: tuple[int, ...]
    coefficients: tuple[float, ...]
    residual: float

    def __call__(self, size: float) -> float:
        return sum(c * size**power for c, power in zip(self.coefficients, self.powers, strict=True))

    def text(self, name: str, *, scale: float = 1.0) -> str:
        """As a formula in `name`; a term that the fit left out is not written."""
        terms = [
            f"{c * scale:.3g}" + ("" if power == 0 else f" {name}" if power == 1 else f" {name}^{power}")
            for c, power in zip(self.coefficients, self.powers, strict=True)
            if c > 0
        ]
        return " + ".join(terms)


def fit(sizes: Sequence[float], costs: Sequence[float], powers: Sequence[int]) -> Law:
    """Non-negative least squares of relative errors, so that the small sizes weigh as much as the large ones.

    So few powers that every choice of those that stay above zero is tried: the best is exact.
    """
    found: list[tuple[float, Law]] = []
    for count in range(1, min(len(powers), len(sizes)) + 1):
        for chosen in combinations(powers, count):
            law = _free_fit(sizes, costs, chosen, powers)
            if min(law.coefficients) >= 0:
                errors = _relative_errors(law, sizes, costs)
                found.append((float(np.square(errors).sum()), law))
    return min(found, key=lambda pair: pair[0])[1]


def _free_fit(
    sizes: Sequence[float], costs: Sequence[float], chosen: Sequence[int], powers: Sequence[int]
) -> Law:
    largest, target = max(sizes), np.asarray(costs, dtype=np.float64)
    columns = np.stack([(np.asarray(sizes) / largest) ** power / target for power in chosen], axis=1)
    solved, *_ = np.linalg.lstsq(columns, np.ones(len(target)), rcond=None)
    by_power = {p: float(c) / largest**p for p, c in zip(chosen, solved, strict=True)}
    law = Law(tuple(powers), tuple(by_power.get(power, 0.0) for power in powers), 0.0)
    return Law(law.powers, law.coefficients, max(map(abs, _relative_errors(law, sizes, costs))))


def _relative_errors(law: Law, sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    return [law(size) / cost - 1 for size, cost in zip(sizes, costs, strict=True)]


def error_at_the_largest(sizes: Sequence[float], costs: Sequence[float], powers: Sequence[int]) -> float:
    """By how much the law of all other sizes misses the largest, relative: above 0 it says too much."""
    largest = max(range(len(sizes)), key=lambda number: sizes[number])
    others = [number for number in range(len(sizes)) if number != largest]
    law = fit([sizes[number] for number in others], [costs[number] for number in others], powers)
    return law(sizes[largest]) / costs[largest] - 1
