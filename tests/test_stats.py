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


def resampled_t(values, resamples, rng):
    """How far each resample's mean lies from the sample's, in the resample's own standard errors, one by one."""
    n, away = len(values), []
    for _ in range(resamples):
        drawn = rng.choice(values, n)
        difference = sum(drawn) / n - sum(values) / n
        error = (sum((x - sum(drawn) / n) ** 2 for x in drawn) / (n - 1) / n) ** 0.5
        away += [difference / error] if error > 0 else []
    return np.sort(away)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_interval_is_a_loops(level):
    values = np.random.default_rng(2).lognormal(1.0, 1.0, size=10)
    ours = bootstrap_interval(values, seed=0, level=level, resamples=100_000)
    away, error = resampled_t(values, 20_000, np.random.default_rng(1)), values.std(ddof=1) / 10**0.5
    share = [np.mean(away <= (values.mean() - bound) / error) for bound in (ours.low, ours.high)]
    assert ours.value == pytest.approx(values.mean())
    assert share == pytest.approx([(1 + level) / 2, (1 - level) / 2], abs=0.006)
    assert ours.high - ours.value > 1.5 * (ours.value - ours.low), "it follows the skew"


def test_bootstrap_interval_is_a_loops_over_the_same_resamples():
    """The stream of the generator is known, so these are the very resamples."""
    values, rng = np.array([0.0, 0.3, 1.0, 1.1, 4.0]), np.random.default_rng(7)
    drawn = values[rng.integers(5, size=(999, 5))]
    t = [(row.mean() - values.mean()) / (np.std(row, ddof=1) / 5**0.5) for row in drawn if len(set(row)) > 1]
    steps = len(t) - 1  # the nearest to 2.5 % and 97.5 % of so many steps
    low, high = np.sort(t)[[round(0.025 * steps), round(0.975 * steps)]]
    error = values.std(ddof=1) / 5**0.5
    expected = values.mean() - high * error, values.mean() - low * error
    assert bootstrap_interval(values, 7, resamples=999)[1:] == pytest.approx(expected)


def test_missing_values_are_left_out_and_a_seed_gives_one_interval():
    values = np.random.default_rng(2).normal(1.0, 2.0, size=10)
    ours = bootstrap_interval(values, seed=0)
    assert ours == bootstrap_interval(np.append(values, np.nan), seed=0)
    assert ours != bootstrap_interval(values, seed=1)
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


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_values_get_students_t(n):
    values = np.random.default_rng(n).normal(size=n)
    ours = bootstrap_interval(values, seed=0, level=0.9)
    theirs = reference.ttest_1samp(values, 0).confidence_interval(0.9)
    assert ours == pytest.approx((values.mean(), theirs.low, theirs.high))


def test_five_values_are_resampled():
    values = np.array([0.0, 0.0, 0.1, 0.2, 5.0])
    theirs = reference.ttest_1samp(values, 0).confidence_interval()
    assert bootstrap_interval(values, seed=0).high > 2 * theirs.high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.3], [0.3] * 3, [0.3] * 10, [0.3, np.nan]])
def test_the_same_value_throughout_is_its_own_interval(values):
    assert bootstrap_interval(np.array(values), seed=0) == pytest.approx((0.3, 0.3, 0.3), abs=1e-15)


def test_resamples_without_an_error_are_left_out():
    """Of ten values that are 1 but for one 0, a third of the resamples are all 1: the others give the interval."""
    values = np.array([0.0] + [1.0] * 9)
    ours = bootstrap_interval(values, seed=0)
    assert ours.value == 0.9
    assert np.isfinite(ours).all()
    assert ours.low <= ours.value < ours.high


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
