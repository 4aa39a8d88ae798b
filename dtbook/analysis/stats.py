"""Weighted summaries of a population, and intervals over replications.

The observations are the population: what is computed over all of them has no sampling error, and is summarised by
weights. The replications are the sample: intervals and tests are over them.
"""

import itertools
import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.special
from jaxtyping import Float, Float64, UInt16

from dtbook.analysis import sums
from dtbook.artifacts.parameters import Count, Whole, checked


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
    bins, often = _bins(values), np.zeros(len(ASCENDING))
    sums.add_up(bins, weights, often)
    used = ASCENDING[often[ASCENDING] > 0]
    ends = np.cumsum(often[used])
    share = np.asarray(at) * ends[-1] * (1 - 1e-12)  # the last sum and its share may differ by rounding
    within = np.minimum(np.searchsorted(ends, share), len(ends) - 1)
    wanted = np.zeros(len(ASCENDING), np.bool_)
    wanted[used[within]] = True  # only the bins that hold a quantile are sorted
    rows = np.empty(len(bins), np.int64)
    rows = rows[: sums.find_in(bins, wanted, rows)]
    quantiles = np.empty(len(share), values.dtype)
    for bin_ in np.unique(within):
        members, of_bin = rows[bins[rows] == used[bin_]], within == bin_
        members = members[np.argsort(values[members], kind="stable")]
        cumulated = ends[bin_] - often[used[bin_]] + np.cumsum(weights[members], dtype=np.float64)
        quantiles[of_bin] = values[
            members[np.minimum(np.searchsorted(cumulated, share[of_bin]), len(members) - 1)]
        ]
    return quantiles


ASCENDING = np.concatenate([np.arange(0xFFFF, 0x7FFF, -1), np.arange(0x8000)])
"""The bins of `_bins` in the order of their values: the negative ones come first, the largest of them ahead."""


def _bins(values: Float[np.ndarray, " n"]) -> UInt16[np.ndarray, " n"]:
    """Return a bin for each value: its sign, exponent and seven digits."""
    first = 1 if sys.byteorder == "little" else 0
    return np.ascontiguousarray(values, np.float32).view(np.uint16)[first::2]


def weighted_correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> float:
    """Return Pearson's r of x and y, each pair counted by its weight; both must vary."""
    return correlation_of(weighted_products(x, y, weights))


def weighted_products(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> Float64[np.ndarray, "3 3"]:
    """Return the weighted sums of all products of 1, x and y. Those of parts of the values add up."""
    each = np.stack([np.ones(len(x)), x, y])
    return (weights * each) @ each.T


def correlation_of(products: Float64[np.ndarray, "3 3"]) -> float:
    """Return Pearson's r from the sums that `weighted_products` returns."""
    share = products / products[0, 0]
    covariance = share[1:, 1:] - np.outer(share[0, 1:], share[0, 1:])
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def check_table(name: str, table: pd.DataFrame) -> None:
    """Raise ValueError naming the first column of a table that holds a number which is not finite."""
    for column, values in table.select_dtypes("number").items():
        if (wrong := values[~np.isfinite(values)]).size:
            raise ValueError(
                f"{name} holds {wrong.iloc[0]} in its column {column!r}; every number must be finite."
            )


class Interval(NamedTuple):
    """A mean over replications, and its interval."""

    value: float
    low: float
    high: float

    def excludes(self, number: float) -> bool:
        """Return whether `number` lies outside of it."""
        return not self.low <= number <= self.high


FEWEST_TO_RESAMPLE = 5
"""Values from which on an interval is a bootstrap; resamples of fewer are too often all the same value."""


@checked
def bootstrap_interval(
    values: Float[np.ndarray, " n"], seed: Whole, level: float = 0.95, resamples: Count = 10_000
) -> Interval:
    """Return the mean over replications with its bootstrap-t interval.

    Each resample's mean is taken in units of that resample's own standard error; resamples of one value alone, which
    have none, are left out. Of ten values this covers 90 to 97 %
    over six shapes, skewed ones among them, where the percentile bootstrap covers 81 to 92 % and Student's t 85 to 95 %
    (`benchmarks/intervals.py`). Fewer than `FEWEST_TO_RESAMPLE` values get Student's t; one value is its own interval,
    which says nothing. Missing values (NaN) are left out. Raises ValueError for no values. (Efron & Tibshirani 1993,
    section 12.5.)
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("values must hold at least one number; there is none.")
    mean, tails = float(values.mean()), np.array([(1 - level) / 2, (1 + level) / 2])
    if len(values) < FEWEST_TO_RESAMPLE:
        return student_interval(values, level)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    error = values.std(ddof=1) / np.sqrt(len(values))
    low, high = np.quantile(_resampled_t(values, seed, resamples), tails, method="nearest")
    return Interval(mean, float(mean - high * error), float(mean - low * error))


def student_interval(values: Float[np.ndarray, " n"], level: float = 0.95) -> Interval:
    """Return the mean of values with its interval by Student's t; equal values, or one, are their own interval.

    It is for few values whose distribution is near a normal one, such as means over several models. Raises ValueError
    for no values, and for one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must hold at least one number, all of them finite, not {values}.")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    error = values.std(ddof=1) / np.sqrt(len(values))
    margin = float(scipy.special.stdtrit(len(values) - 1, (1 + level) / 2) * error)
    return Interval(mean, mean - margin, mean + margin)


def _resampled_t(values: Float64[np.ndarray, " n"], seed: int, resamples: int) -> Float64[np.ndarray, " r"]:
    """Return how far each resample's mean lies from the sample's, in its standard errors, of those that have one."""
    rng, n = np.random.default_rng(seed), len(values)
    drawn = values[rng.integers(n, size=(resamples, n))]
    away, errors = drawn.mean(1) - values.mean(), drawn.std(1, ddof=1) / np.sqrt(n)
    return away[errors > 0] / errors[errors > 0]


def factor_effects(
    table: pd.DataFrame, factors: Mapping[str, tuple[str, str]], value: str, unit: str = "seed"
) -> pd.DataFrame:
    """Return what each of several factors of two levels, and each pair of them, adds to a value; one row a term.

    `table` has one row a cell (a combination of levels) and unit; `factors` maps a factor's column to its two levels.
    Columns: `term` ("start", "start × data"), `effect` with its 95 % interval `low`, `high`, and `n`, the units behind
    it; the effect is in the unit of the value. A main effect is the mean at the first level − that at the second, over
    all cells of the others. An interaction is half of what the one factor's effect is at the other's first level − at
    its second. Each is a contrast within a unit, and the interval is Student's t over the units' contrasts. Units
    without a number in every cell are left out; where none is left, so is every term. Raises ValueError where a unit
    has a cell twice. (Box, Hunter & Hunter 2005, chapter 5.)
    """
    names = list(factors)
    cells = list(itertools.product(*factors.values()))
    if table.duplicated([unit, *names]).any():
        raise ValueError(f"table must have one row a cell and {unit}; a row stands twice.")
    wide = table.pivot(index=unit, columns=names, values=value).reindex(columns=cells).dropna()
    if wide.empty:
        return pd.DataFrame(columns=["term", "effect", "low", "high", "n"])
    signs = {
        name: np.array([1 if cell[k] == factors[name][0] else -1 for cell in cells])
        for k, name in enumerate(names)
    }
    terms = {name: signs[name] for name in names}
    terms |= {f"{a} × {b}": signs[a] * signs[b] for a, b in itertools.combinations(names, 2)}
    found = {term: student_interval(wide.to_numpy() @ sign * 2 / len(cells)) for term, sign in terms.items()}
    rows = [(term, *interval, len(wide)) for term, interval in found.items()]
    return pd.DataFrame(rows, columns=["term", "effect", "low", "high", "n"])


class Line(NamedTuple):
    """A least-squares line through values at t = 0, 1, …"""

    slope: float
    low: float
    high: float
    """The 95 % interval of the slope, for residuals that are independent of one another."""
    r2: float
    memory: float
    """Correlation of neighbouring residuals: where it is large, the interval is too narrow."""


def least_squares(values: Float[np.ndarray, " n"]) -> Line:
    """Return the line through values at t = 0 … n − 1. Raises ValueError for fewer than three values."""
    if len(values) < 3:
        raise ValueError(f"values are {len(values)}; a slope and its interval need at least 3.")
    y = np.asarray(values, np.float64)
    t = np.arange(len(y)) - (len(y) - 1) / 2
    slope = t @ y / (t @ t)
    residual = y - y.mean() - slope * t
    quantile = float(scipy.special.stdtrit(len(y) - 2, 0.975))  # of Student's t
    margin = quantile * np.sqrt(residual @ residual / (len(y) - 2) / (t @ t))
    memory = residual[1:] @ residual[:-1] / (residual @ residual)
    r2 = 1 - residual @ residual / ((y - y.mean()) @ (y - y.mean()))
    return Line(*map(float, (slope, slope - margin, slope + margin, r2, memory)))
