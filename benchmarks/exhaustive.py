"""Seconds and memory of running a model on every observation: one pass, further passes, the table of chapter 06.

    python benchmarks/exhaustive.py [--hooked-share 0.05] [--table]

The reference model of `data/`, one thread. "hooked" is the model called as anyone would, in batches of 8,192, on a
share of the observations, its seconds scaled up to all. Both clocks are shown: `seconds` on the wall, `cpu` of this
process alone, which other work on the machine does not lengthen as much. `peak` is the memory the process has held
at most so far, Python and torch included.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from dtbook.analysis.ablations import situation_table
from dtbook.analysis.population import logits
from dtbook.artifacts import ArtifactStore
from dtbook.gridworld import ObservationSet, all_observations
from dtbook.gridworld.situations import batches, sample
from dtbook.model import DecisionTransformer
from dtbook.protocol import RTGS, TIMESTEPS

TARGETS = {"one (RTG, t) pass, listing included": 6.0, "table behind chapter 06": 240.0}
"""Seconds on one core."""


def peak() -> float:
    """The most memory this process has held so far (GB)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clocked(work: str, do: Callable[[], Any], scale: float = 1.0) -> dict[str, object]:
    """A row of the table: seconds on the wall and of this process, and the peak after it."""
    wall, cpu = time.perf_counter(), time.process_time()
    do()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    target = TARGETS.get(work, np.nan)
    return {"work": work, "seconds": wall * scale, "cpu": cpu * scale, "target": target, "peak GB": peak()}


def hooked(model: DecisionTransformer, observations: ObservationSet) -> None:
    """The logits at one condition, by the model itself."""
    with torch.inference_mode():
        for batch in batches(observations, 0.9, 10):
            model(*batch.inputs)


def measure(hooked_share: float, table: bool) -> pd.DataFrame:
    """One row a piece of work: `seconds`, `cpu`, `target` and `peak GB`."""
    model = DecisionTransformer.from_pretrained(ArtifactStore().path("seed_0/model"))
    small = all_observations(5, 2)
    logits(model, small, [(0.9, 10)])  # compile the kernel
    found: list[ObservationSet] = []

    def one_pass() -> None:
        found.append(all_observations())
        logits(model, found[0], [(0.9, 10)])

    rows = [{"work": "nothing yet", "peak GB": peak()}]
    rows.append(clocked("one (RTG, t) pass, listing included", one_pass))
    observations = found[0]
    rows.append(clocked("one pass, observations listed", lambda: logits(model, observations, [(0.9, 10)])))
    fifteen = [(rtg, timestep) for rtg in RTGS for timestep in TIMESTEPS]
    rows.append(clocked("fifteen passes, sharing", lambda: logits(model, observations, fifteen)))
    some, _ = sample(observations, int(len(observations.images) * hooked_share), np.random.default_rng(0))
    rows.append(clocked("one pass, hooked", lambda: hooked(model, some), 1 / hooked_share))
    if table:
        rows.append(
            clocked("table behind chapter 06", lambda: situation_table(model, observations, progress=True))
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hooked-share", type=float, default=0.05, help="of the observations, by the hooks")
    parser.add_argument(
        "--table", action=argparse.BooleanOptionalAction, default=True, help="make the table too (minutes)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(measure(options.hooked_share, options.table).round(2).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
