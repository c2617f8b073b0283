"""The paired bootstrap against a slow one, and against differences that are known."""

from __future__ import annotations

import numpy as np
import pytest

from ask_dist.ablation.statistics import compare


def slow_interval(difference: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    """Every resample spelled out."""
    generator = np.random.default_rng(seed)
    seeds, queries = difference.shape
    means = []
    for _ in range(resamples):
        drawn_seeds = generator.integers(seeds, size=seeds)
        drawn_queries = generator.integers(queries, size=queries)
        means.append(np.mean([difference[s, q] for s in drawn_seeds for q in drawn_queries]))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_agrees_with_a_slow_bootstrap(rng):
    values, baseline = rng.normal(size=(3, 17)), rng.normal(size=(3, 17))
    found = compare(values, baseline, seed=4, resamples=60)
    assert (found.low, found.high) == pytest.approx(slow_interval(values - baseline, 4, 60))
    assert found.difference == pytest.approx(values.mean() - baseline.mean())


def test_a_constant_difference_has_no_spread_however_hard_the_queries_differ(rng):
    baseline = 100.0 * rng.normal(size=(3, 200))
    found = compare(baseline + 2.5, baseline)
    assert (found.difference, found.low, found.high) == pytest.approx((2.5, 2.5, 2.5))


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says(rng):
    held = 0
    for trial in range(200):
        query = rng.normal(size=(1, 80))
        values, baseline = (query + rng.normal(size=(3, 80)) for _ in range(2))
        found = compare(values + 0.3, baseline, seed=trial, resamples=200)
        held += found.low <= 0.3 <= found.high
    assert held >= 180  # of 200; 95% are meant


def test_queries_without_a_value_take_no_part():
    values = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]])
    baseline = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, np.nan]])
    found = compare(values, baseline)
    assert (found.mean, found.baseline_mean, found.difference) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "baseline", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), "of one shape"),
        (np.zeros(3), np.zeros(3), "of one shape"),
        (np.full((1, 2), np.nan), np.zeros((1, 2)), "no query has a value"),
    ],
)
def test_what_can_not_be_compared_is_refused(values, baseline, message):
    with pytest.raises(ValueError, match=message):
        compare(values, baseline)
