"""How often an interval of ten values holds the mean that they were drawn around: three methods, six shapes.

    python benchmarks/intervals.py [--samples 2000] [--n 10]

Each method means to hold it in 95 % of the samples. The bootstrap-t is `stats.bootstrap_interval` itself, by which the
book's verdicts are made; the other two are written out here. Coverage of 2,000 samples is known to about 0.5 points.
"""

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy import stats

from dtbook.analysis.stats import bootstrap_interval

LEVEL, RESAMPLES = 0.95, 10_000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def mixture(rng: np.random.Generator, n: int) -> np.ndarray:
    """One in five lies about 3, the others about 0, each with a spread of 0.3."""
    return np.where(rng.random(n) < 0.2, 3, 0) + rng.normal(0, 0.3, n)


SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "lognormal, s = 0.5": (lambda rng, n: rng.lognormal(0, 0.5, n), float(np.exp(0.125))),
    "lognormal, s = 1": (lambda rng, n: rng.lognormal(0, 1, n), float(np.exp(0.5))),
    "20 % at 3, the rest at 0": (mixture, 0.6),
}
"""How values are drawn, and the mean they are drawn around."""


def percentile(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the interval that holds 95 % of the resamples' means."""
    rng, n = np.random.default_rng(seed), len(values)
    means = values[rng.integers(n, size=(RESAMPLES, n))].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return low, high


def student(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return Student's interval."""
    return stats.t.interval(LEVEL, len(values) - 1, values.mean(), stats.sem(values))


def bootstrap_t(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the book's interval."""
    _, low, high = bootstrap_interval(values, seed, LEVEL, RESAMPLES)
    return low, high


METHODS = {"percentile bootstrap": percentile, "Student's t": student, "bootstrap-t": bootstrap_t}


def coverage(draw: Draw, mean: float, n: int, samples: int) -> dict[str, float]:
    """Return the percentage of samples whose interval holds the mean, and the median width, by method."""
    rng, bounds = np.random.default_rng(0), {name: np.zeros((samples, 2)) for name in METHODS}
    for k in range(samples):
        values = draw(rng, n)
        for name, method in METHODS.items():
            bounds[name][k] = method(values, k)
    held = {name: 100 * np.mean((low <= mean) & (mean <= high)) for name, (low, high) in _columns(bounds)}
    return held | {f"{name}, width": np.median(high - low) for name, (low, high) in _columns(bounds)}


def _columns(bounds: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return [(name, table.T) for name, table in bounds.items()]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--n", type=int, default=10)
    args = parser.parse_args()
    table = pd.DataFrame({name: coverage(*shape, args.n, args.samples) for name, shape in SHAPES.items()}).T
    print(f"coverage of 95 % intervals of the mean of {args.n} values (%), {args.samples} samples a shape")
    print(table[[*METHODS]].to_string(float_format="{:.1f}".format))
    print("\nmedian width of the interval")
    print(
        table[[f"{name}, width" for name in METHODS]]
        .set_axis([*METHODS], axis=1)
        .to_string(float_format="{:.2f}".format)
    )


if __name__ == "__main__":
    main()
