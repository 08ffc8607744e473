"""Bootstrap of a mean: how far it could have come out with other images."""

from __future__ import annotations

import math

import numpy as np

NUM_RESAMPLES = 10_000


def resampled_means(sums: np.ndarray, sizes: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the mean gain of every resample, from the images' summed gains 'seeds images' and their numbers of rows.

    Over several seeds the mean is drawn from Student's t.
    """
    generator = np.random.default_rng(seed)
    num_seeds, num_images = sums.shape

    def resampled() -> float:  # one at a time: all resamples together would take gigabytes
        images = generator.integers(num_images, size=num_images)
        of_seeds = sums[:, images].sum(axis=1) / sizes[images].sum()
        if num_seeds == 1:
            return of_seeds[0]
        standard_error = of_seeds.std(ddof=1) / math.sqrt(num_seeds)
        return of_seeds.mean() + standard_error * generator.standard_t(num_seeds - 1)

    return np.array([resampled() for _ in range(NUM_RESAMPLES)])


def resampled_totals(rows: np.ndarray, strata: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the column sums of every resample, 'resamples columns', from the counts of images 'images columns'.

    Images are drawn within their stratum, 'images', so that each resample has as many of each. Equal seeds, strata
    and numbers of images draw the same images: two models are compared in pairs.
    """
    generator = np.random.default_rng(seed)
    blocks = [rows[strata == stratum] for stratum in np.unique(strata)]

    def resampled() -> np.ndarray:
        drawn = (block[generator.integers(len(block), size=len(block))].sum(axis=0) for block in blocks)
        return np.sum(list(drawn), axis=0)

    return np.array([resampled() for _ in range(NUM_RESAMPLES)])


def means_over_seeds(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Return the mean over seeds of every resample, from 'seeds resamples'; of several, drawn from Student's t."""
    num_seeds, num_resamples = values.shape
    if num_seeds == 1:
        return values[0]
    draws = np.random.default_rng(seed).standard_t(num_seeds - 1, size=num_resamples)
    return values.mean(axis=0) + values.std(axis=0, ddof=1) / math.sqrt(num_seeds) * draws
