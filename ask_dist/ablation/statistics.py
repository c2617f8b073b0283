"""Paired comparison of two arms over queries and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """An arm against its baseline, in the unit of the values.

    Attributes:
        mean, baseline_mean: over seeds and queries.
        difference: mean - baseline_mean.
        low, high: 95% percentile-bootstrap interval of the difference.
    """

    mean: float
    baseline_mean: float
    difference: float
    low: float
    high: float


def compare(values: np.ndarray, baseline: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> Comparison:
    """The paired bootstrap: seeds and queries are drawn anew together, both with replacement.

    Pairing by query and by seed takes out what both arms share (a hard query, a lucky initialisation). A query
    without a value (NaN, such as a probe of an attribute that the clip lacks) takes no part.

    Args:
        values, baseline: float [seeds, queries], the same seeds and queries in both.
        seed: of the resampling.
        resamples: how often seeds and queries are drawn anew.

    Raises:
        ValueError: the shapes differ, or no query has a value.
    """
    if values.shape != baseline.shape or values.ndim != 2:
        raise ValueError(
            f"values {values.shape} and baseline {baseline.shape} must be two [seeds, queries] of one shape"
        )
    difference = values - baseline
    kept = np.isfinite(difference).all(axis=0)
    if not kept.any():
        raise ValueError("no query has a value in every seed of both arms")
    difference = difference[:, kept]
    seeds, queries = difference.shape
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        # Mean over drawn seeds first: [queries], then over drawn queries; the same as indexing both, but cheaper.
        by_query = difference[generator.integers(seeds, size=seeds)].mean(axis=0)
        means[i] = by_query[generator.integers(queries, size=queries)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    mean, baseline_mean = float(values[:, kept].mean()), float(baseline[:, kept].mean())
    return Comparison(mean, baseline_mean, mean - baseline_mean, float(low), float(high))
