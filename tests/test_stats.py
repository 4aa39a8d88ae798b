"""Weighted summaries and intervals against scipy, numpy and exact enumeration."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as reference

from dtbook.analysis.stats import (
    bootstrap_interval,
    factor_effects,
    least_squares,
    student_interval,
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


def test_student_interval_is_scipys():
    values = np.random.default_rng(3).normal(1.0, 2.0, size=5)
    theirs = reference.ttest_1samp(values, 0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((values.mean(), theirs.low, theirs.high), rel=1e-12)
    assert student_interval(np.array([0.5])) == (0.5, 0.5, 0.5)


FACTORS = {"start": ("post", "book"), "data": ("history", "quota"), "optimiser": ("post", "book")}


def factorial(seeds=5, noise=0.0):
    """Rows whose value is 10 + the seed + 3 for the post's start + 4 for it on history + noise of the seed's own."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for start, data, optimiser in itertools.product(*FACTORS.values()):
            value = 10 + seed + 3 * (start == "post") + 4 * (start == "post" and data == "history")
            cell = {"start": start, "data": data, "optimiser": optimiser, "seed": seed}
            rows.append(cell | {"value": value + noise * rng.normal()})
    return pd.DataFrame(rows)


def test_factors_add_what_was_put_into_the_table():
    found = factor_effects(factorial(), FACTORS, "value").set_index("term")
    expected = {"start": 5, "data": 2, "optimiser": 0}
    expected |= {"start × data": 2, "start × optimiser": 0, "data × optimiser": 0}
    assert found["effect"].to_dict() == pytest.approx(expected)
    assert found[["low", "high"]].to_numpy() == pytest.approx(found[["effect", "effect"]].to_numpy()), (
        "a seed's own level is in all its cells, and so in no contrast"
    )
    assert (found["n"] == 5).all()


def test_the_interval_of_a_factor_is_that_of_a_paired_test_over_seeds():
    table = factorial(noise=1.0)
    found = factor_effects(table, FACTORS, "value").set_index("term")
    by_seed = table.groupby(["start", "seed"])["value"].mean()
    paired = reference.ttest_rel(by_seed["post"], by_seed["book"]).confidence_interval(0.95)
    assert found.loc["start", ["low", "high"]].tolist() == pytest.approx([paired.low, paired.high])
    corner = table.groupby(["start", "data", "seed"])["value"].mean()
    at = {data: corner["post", data] - corner["book", data] for data in ("history", "quota")}
    paired = reference.ttest_1samp((at["history"] - at["quota"]) / 2, 0).confidence_interval(0.95)
    assert found.loc["start × data", ["low", "high"]].tolist() == pytest.approx([paired.low, paired.high])


def test_seeds_without_every_cell_are_left_out_of_the_factors():
    table = factorial(noise=1.0)
    table.loc[0, "value"] = np.nan
    partial = factor_effects(table[:-1], FACTORS, "value")
    whole = table[table["seed"].between(1, 3)]
    pd.testing.assert_frame_equal(partial, factor_effects(whole, FACTORS, "value"))
    assert (partial["n"] == 3).all()
    assert factor_effects(table[:5], FACTORS, "value").empty
    with pytest.raises(ValueError, match="a row stands twice"):
        factor_effects(pd.concat([table, table[:1]]), FACTORS, "value")


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
