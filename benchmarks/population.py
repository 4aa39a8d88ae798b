"""Seconds and memory of running a model on every observation, beside what it replaced and what the machine allows.

    python benchmarks/population.py [--hooked-share 0.05] [--table] [--device cuda]

The reference model of `data/`, one thread. "matrix products" is the pass as it was (`_matrix_products`); "hooked" is
the model called as anyone would, in batches of 8,192, on a share of the observations, its seconds scaled up to all.
Both clocks are shown: `seconds` on the wall, `cpu` of this process alone, which other work on the machine does not
lengthen as much. `ratio` is the cpu of the matrix products ÷ that of the row. `peak` is the memory the process has held
at most so far, Python and torch included. The limit counts what one pass adds and multiplies, at the rate of a loop of
fused multiply-adds on numbers in the nearest cache.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import _matrix_products as matrix_products
import numpy as np
import pandas as pd
import torch

from dtbook.analysis.ablations import situation_table
from dtbook.analysis.behaviour import over_time
from dtbook.analysis.folded import FoldedWeights
from dtbook.analysis.population import logits
from dtbook.artifacts import ArtifactStore
from dtbook.claims.evidence import Evidence
from dtbook.claims.rules import decide_claims
from dtbook.gridworld import ObservationSet, all_observations
from dtbook.gridworld.decomposition import take_apart
from dtbook.gridworld.kernels import compiled
from dtbook.gridworld.situations import batches, sample
from dtbook.model import DecisionTransformer
from dtbook.protocol import RTGS, TIMESTEPS

RTG, TIMESTEP = 0.9, 10
BARS = {
    "table behind chapter 06": 12.0,
    "all claims of a model": 6.0,
    "301 timesteps × 21 returns, what is in front": 300.0,
}
"""Seconds on one core."""
EVERY = 10
"""Of the 301 timesteps every so many are run, at one of the 21 returns; the seconds are scaled up."""


def peak() -> float:
    """The most memory this process has held so far (GB)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clocked(work: str, do: Callable[[], Any], scale: float = 1.0, best_of: int = 1) -> dict[str, object]:
    """A row of the table: seconds on the wall and of this process, and the peak after it."""
    times = []
    for _ in range(best_of):
        wall, cpu = time.perf_counter(), time.process_time()
        do()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = min(times)
    bar = BARS.get(work, np.nan)
    return {"work": work, "seconds": wall * scale, "cpu": cpu * scale, "bar": bar, "peak GB": peak()}


@partial(compiled, fastmath=True)
@no_type_check
def multiply_add(a, b, c, rounds):
    """Add the product of a and b to c[0], over and over."""
    for r in range(rounds):
        total = a[0] * 0
        for j in range(len(a)):
            total += a[j] * b[j]
        c[r % len(c)] += total


def operations(model: DecisionTransformer, observations: ObservationSet) -> float:
    """Multiplications and additions of one pass, a fused pair counted once, a maximum as well."""
    parts, cfg = observations.parts, model.cfg
    alike = (parts.view[1:] == parts.view[:-1])[:, None] & (parts.obstacle[1:] == parts.obstacle[:-1])
    shared = (np.cumprod(alike, 1).astype(bool) & (parts.obstacle[1:] >= 0)).sum()
    rows = (parts.obstacle >= 0).sum() - shared  # added to the sums
    columns = cfg.d_mlp + cfg.n_actions + 1
    of_rows = rows * (1 + cfg.n_heads) * columns
    each = 2 * (1 + cfg.n_heads) * columns + cfg.d_mlp * (cfg.n_heads + 1 + cfg.n_actions)
    return float(of_rows + len(observations) * each)


def limit(model: DecisionTransformer, observations: ObservationSet) -> dict[str, object]:
    """Seconds that the operations of one pass take at the rate of fused multiply-adds."""
    a, b, c = (np.full(3072, 1e-3, np.float32) for _ in range(3))
    rounds = 200_000
    multiply_add(a, b, c, 1)
    row = clocked(
        "limit: its operations as fused multiply-adds", lambda: multiply_add(a, b, c, rounds), best_of=3
    )
    scale = operations(model, observations) / (rounds * len(c))
    return row | {"seconds": row["seconds"] * scale, "cpu": row["cpu"] * scale}  # type: ignore[operator]


def hooked(model: DecisionTransformer, observations: ObservationSet) -> None:
    """The logits at one condition, by the model itself."""
    with torch.inference_mode():
        for batch in batches(observations, RTG, TIMESTEP):
            model(*batch.inputs)


def grid(model: DecisionTransformer, observations: ObservationSet) -> dict[str, object]:
    """The row of a map over return and timestep, of all observations with something in front."""
    timesteps = range(0, 301, EVERY)
    name = "301 timesteps × 21 returns, what is in front"
    scale = 21 * 301 / len(timesteps)
    facing = ("obstacle", "wall", "goal")
    return clocked(name, lambda: over_time(model, observations, (RTG,), timesteps, facing), scale)


def on_device(model: DecisionTransformer, observations: ObservationSet, device: str) -> dict[str, object]:
    """The row of a pass in plain PyTorch on a device."""

    def run() -> None:
        logits(model, observations, [(RTG, TIMESTEP)], device=device)

    run()
    return clocked(f"one pass, plain PyTorch on {device}", run, best_of=3)


def measure(hooked_share: float, table: bool, device: str | None) -> pd.DataFrame:
    """One row a piece of work: `seconds`, `cpu`, `bar`, `ratio` and `peak GB`."""
    store = ArtifactStore()
    model = DecisionTransformer.from_pretrained(store.path("seed_10/model"))
    calibration = pd.read_parquet(store.path("seed_10/calibration.parquet"))
    small, one = all_observations(5, 2), [(RTG, TIMESTEP)]
    situation_table(model, small), matrix_products.logits(model, small, *one[0])  # compile the kernels
    rows = [{"work": "nothing yet", "peak GB": peak()}]
    listed: list[ObservationSet] = []
    rows.append(clocked("observations listed", lambda: listed.append(all_observations())))
    observations = listed[0]
    rows.append(clocked("and taken apart", lambda: take_apart(observations.images)))
    rows.append(clocked("tables and embedding", lambda: FoldedWeights(model).embed(observations)))
    for name, run in {
        "one pass, matrix products": lambda: matrix_products.logits(model, observations, *one[0]),
        "one pass": lambda: logits(model, observations, one),
    }.items():
        rows.append(clocked(name, run, best_of=3))
    peer = rows[-2]["cpu"]
    rows.append(limit(model, observations))
    fifteen = [(rtg, timestep) for rtg in RTGS for timestep in TIMESTEPS]
    rows.append(clocked("fifteen passes", lambda: logits(model, observations, fifteen)))
    some, _ = sample(observations, int(len(observations.images) * hooked_share), np.random.default_rng(0))
    rows.append(clocked("one pass, hooked", lambda: hooked(model, some), 1 / hooked_share))
    if device:
        rows.append(on_device(model, observations, device))
    rows.append(
        clocked("all claims of a model", lambda: decide_claims(Evidence(model, observations, calibration)))
    )
    rows.append(grid(model, observations))
    if table:
        rows.append(clocked("table behind chapter 06", lambda: situation_table(model, observations)))
    columns = pd.DataFrame(rows)
    columns.insert(
        3, "ratio", (peer / columns["cpu"]).where(columns["work"].str.startswith(("one pass", "limit")))
    )
    return columns


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hooked-share", type=float, default=0.05, help="of the observations, by the hooks")
    parser.add_argument(
        "--table",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make the table of chapter 06 too",
    )
    parser.add_argument("--device", help="of PyTorch, such as cuda, to run a pass on too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(options.hooked_share, options.table, options.device)
    print(table.round(2).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
