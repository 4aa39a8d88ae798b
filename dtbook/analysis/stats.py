"""Weighted summaries of a population, and intervals over replications.

The observations are the population: what is computed over all of them has no sampling error, and is summarised by
weights. The replications are the sample: intervals and tests are over them.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MAX_EXACT = 16
"""Up to this many values a sign-flip test goes through all 2ⁿ flips; above it draws them."""


def weighted_quantile(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], at: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Return the smallest values below or at which lie at least the shares `at` of the weight.

    Every one is a value that occurs. Raises ValueError for no values, weights that sum to nothing and shares outside
    [0, 1].
    """
    if not len(values) or not weights.sum() > 0:
        raise ValueError("values must be at least one, with a positive weight; there is none.")
    if np.min(at) < 0 or np.max(at) > 1:
        raise ValueError(f"at must lie between 0 and 1, not {at}.")
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(weights[order], dtype=np.float64)
    share = np.asarray(at) * cumulated[-1] * (1 - 1e-12)  # the last sum and its share may differ by rounding
    return values[order][np.minimum(np.searchsorted(cumulated, share), len(values) - 1)]


def weighted_correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Return Pearson's r of x and y, each pair counted by its weight; both must vary."""
    share = weights / weights.sum()
    x, y = x - share @ x, y - share @ y
    return float((share * x) @ y / np.sqrt(((share * x) @ x) * ((share * y) @ y)))


class Interval(NamedTuple):
    """A statistic of the sample, and the interval that holds the given share of its bootstrap distribution."""

    value: float
    low: float
    high: float

    def excludes(self, number: float) -> bool:
        """Return whether `number` lies outside of it."""
        return not self.low <= number <= self.high


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    seed: int,
    level: float = 0.95,
    resamples: int = 10_000,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> Interval:
    """Return a statistic over replications with its percentile bootstrap interval.

    `statistic` is called with `axis=`. Missing values (NaN) are left out. With one value the interval is that value:
    it says nothing then. Raises ValueError for no values. (Efron 1979; of ten values it is a little narrow.)
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("values must hold at least one number; there is none.")
    rng = np.random.default_rng(seed)
    drawn = values[rng.integers(len(values), size=(resamples, len(values)))]
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(drawn, axis=1), [tail, 1 - tail])
    return Interval(float(statistic(values, axis=0)), float(low), float(high))


def permutation_test(differences: Float[np.ndarray, " n"], seed: int, draws: int = 10_000) -> float:
    """Return the two-sided p-value of paired differences having mean 0, by flipping their signs.

    Exact up to `MAX_EXACT` differences, else from `draws` random flips (and the sample itself). Never report it without
    the effect it belongs to. Raises ValueError for no differences.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    if not n:
        raise ValueError("differences must hold at least one number; there is none.")
    if n <= MAX_EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(draws, n))
        signs[0] = 1.0
    means = np.abs(signs @ differences)
    return float((means >= means[0] * (1 - 1e-12)).mean())
