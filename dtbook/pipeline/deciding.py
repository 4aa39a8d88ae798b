"""Which replications decide by the post's recipe: the first whose PPO played every class of episodes often enough."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.pipeline import replication
from dtbook.pipeline.engine import Job, Say, Writer, failures, run_graph, table_row, table_writer
from dtbook.pipeline.measure import CLAIMS_STAGE
from dtbook.pipeline.replication import Recipe, folder_of
from dtbook.trajectories.episodes import CLASS_NAMES, Trajectories

LEAST_SHARE = 0.02
"""Of the episodes of a history, what each class of returns must have for its seed to decide."""
DECIDING, ALL = 10, 30
"""Replications that decide the claims, and those that say how often a whole circuit comes back (M4)."""


def _histories(job: Job) -> list[Writer]:
    return [table_writer(pd.DataFrame([shares(job.origin, seed, job.given) for seed in job.seeds]))]


HISTORIES_STAGE = table_row(
    "histories", _histories, "{of}/histories.parquet", "{of}/seed_{seed}/history.npz", recipe=""
)


def shares(store: ArtifactStore, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Return the row of a history: `seed`, `episodes`, the share of each class of returns, and whether it `decides`."""
    history = Trajectories.load(store.path(f"{folder_of(seed, recipe)}/history.npz"))
    share = np.bincount(history.classes, minlength=len(CLASS_NAMES)) / len(history.classes)
    row = dict(zip(CLASS_NAMES, share.tolist(), strict=True))
    return {
        "seed": seed,
        "episodes": len(history.classes),
        **row,
        "decides": bool(share.min() >= LEAST_SHARE),
    }


@checked
def histories(
    store: ArtifactStore,
    recipe: Recipe,
    wanted: Count = ALL,
    workers: Count = 1,
    scheduler: str | None = None,
    say: Say = lambda line: None,
) -> pd.DataFrame:
    """Run PPO from seed 0 on until so many histories hold every class, and return the `shares` of all that were tried.

    Histories that are there are not made again. The table is kept as `histories.parquet` in the recipe's folder. Raises
    ArtifactError where a run fails.
    """
    rows: list[dict[str, Any]] = []
    while sum(row["decides"] for row in rows) < wanted:
        seeds = range(len(rows), len(rows) + workers)
        _run([replication.replication(store, seed, recipe)[0] for seed in seeds], workers, scheduler, say)
        rows += [shares(store, seed, recipe) for seed in seeds]
    last = [row["seed"] for row in rows if row["decides"]][wanted - 1]
    tried = tuple(range(int(last) + 1))
    Job(HISTORIES_STAGE, store, recipe.folder, recipe, tried, given=recipe).ensure()
    return pd.DataFrame(rows[: len(tried)])


@checked
def replicate_deciding(
    store: ArtifactStore,
    recipe: Recipe,
    wanted: Count = ALL,
    workers: Count = 1,
    scheduler: str | None = None,
    say: Say = lambda line: None,
) -> None:
    """Make so many replications whose histories hold every class, and decide the claims for each.

    Goes on where an interrupted call stopped. Raises ArtifactError naming what failed.
    """
    tried = histories(store, recipe, wanted, workers, scheduler, say)
    _run(jobs(store, tried["seed"][tried["decides"]].tolist(), recipe), workers, scheduler, say)


def jobs(store: ArtifactStore, seeds: Sequence[int], recipe: Recipe) -> list[Job]:
    """Return the jobs of these replications, with the claims of each."""
    of = [folder_of(seed, recipe) for seed in seeds]
    claims = [Job(CLAIMS_STAGE, store, name, recipe, (seed,)) for name, seed in zip(of, seeds, strict=True)]
    return [job for seed in seeds for job in replication.replication(store, seed, recipe)] + claims


def _run(jobs: Sequence[Job], workers: int, scheduler: str | None, say: Say) -> None:
    if failed := failures(run_graph(jobs, workers, scheduler, say)):
        raise ArtifactError(f"{', '.join(failed)} failed; the same command goes on where they stopped")
