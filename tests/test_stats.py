"""Weighted summaries and intervals against scipy, numpy and exact enumeration."""

import numpy as np
import pytest
from scipy import stats as reference

from dtbook.analysis.stats import (
    bootstrap_interval,
    least_squares,
    weighted_correlation,
    weighted_quantile,
)


def test_weighted_quantiles_are_those_of_the_repeated_values():
    rng = np.random.default_rng(0)
    values, counts = rng.normal(size=200), rng.integers(0, 5, size=200)
    at = np.array([0.0, 0.01, 0.3, 0.5, 0.95, 1.0])
    repeated = np.quantile(np.repeat(values, counts), at, method="inverted_cdf")
    assert weighted_quantile(values, counts.astype(float), at).tolist() == repeated.tolist()


def test_weighted_correlation_is_that_of_the_repeated_values():
    rng = np.random.default_rng(1)
    x, counts = rng.normal(size=50), rng.integers(1, 4, size=50)
    y = x + rng.normal(size=50)
    expected = reference.pearsonr(np.repeat(x, counts), np.repeat(y, counts)).statistic
    assert weighted_correlation(x, y, counts.astype(float)) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval_is_scipys():
    values = np.random.default_rng(2).normal(1.0, 2.0, size=10)
    ours = bootstrap_interval(values, seed=0, resamples=50_000)
    theirs = reference.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert ours == bootstrap_interval(np.append(values, np.nan), seed=0, resamples=50_000)
    assert ours.excludes(10.0)
    assert not ours.excludes(float(values.mean()))


def test_a_line_is_scipys():
    y = np.random.default_rng(0).normal(size=51).cumsum()
    theirs, ours = reference.linregress(np.arange(51), y), least_squares(y)
    margin = reference.t.ppf(0.975, 49) * theirs.stderr
    assert ours[:4] == pytest.approx(
        (theirs.slope, theirs.slope - margin, theirs.slope + margin, theirs.rvalue**2), rel=1e-12
    )
    assert ours.memory > 0.5, "a random walk's residuals remember"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: weighted_quantile(np.array([]), np.array([]), np.array([0.5])),
            "values must be at least one",
        ),
        (lambda: weighted_quantile(np.ones(2), np.ones(2), np.array([1.5])), "at must lie between 0 and 1"),
        (lambda: bootstrap_interval(np.array([np.nan]), 0), "values must hold at least one number"),
        (lambda: least_squares(np.ones(2)), "values are 2; a slope and its interval need at least 3"),
    ],
)
def test_what_cannot_be_summarised_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
