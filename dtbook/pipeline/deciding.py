"""Which replications decide by the post's recipe: the first whose PPO played every class of episodes often enough."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dtbook.artifacts.parameters import Count, checked
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.pipeline import measure, replication
from dtbook.pipeline.engine import Job, Say, Writer, failures, run_graph, table_row, table_writer
from dtbook.pipeline.measure import CLAIMS_STAGE
from dtbook.pipeline.replication import POST_RECIPE, Recipe, folder_of
from dtbook.trajectories.episodes import CLASS_NAMES, Trajectories

LEAST_SHARE = 0.02
"""Of the episodes of a history, what each class of returns must have for its seed to decide."""
DECIDING, ALL = 10, 30
"""Replications that decide the claims, and those that say how often a whole circuit comes back (M4)."""
HISTORIES = f"{POST_RECIPE}/histories.parquet"
"""The seeds that were tried, with the shares of each class of returns in their histories."""


def _histories(job: Job) -> list[Writer]:
    return [table_writer(pd.DataFrame([shares(job.origin, seed, job.given) for seed in job.seeds]))]


HISTORIES_STAGE = table_row(
    "histories", _histories, HISTORIES, f"{POST_RECIPE}/seed_{{seed}}/history.npz", recipe=""
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
        run_jobs([replication.replication(store, seed, recipe)[0] for seed in seeds], workers, scheduler, say)
        rows += [shares(store, seed, recipe) for seed in seeds]
    last = [row["seed"] for row in rows if row["decides"]][wanted - 1]
    tried = tuple(range(int(last) + 1))
    Job(HISTORIES_STAGE, store, recipe.folder, recipe, tried, given=recipe).ensure()
    return pd.DataFrame(rows[: len(tried)])


def seeds_that_decide(store: ArtifactStore, wanted: int = DECIDING) -> list[int]:
    """Return the seeds of the post's recipe that decide, the first so many of a store's `histories.parquet`.

    Raises ArtifactError where the store has none.
    """
    tried = pd.read_parquet(store.path(HISTORIES))
    return tried["seed"][tried["decides"]].tolist()[:wanted]


def jobs(store: ArtifactStore, seeds: Sequence[int], recipe: Recipe) -> list[Job]:
    """Return the jobs of these replications, with the claims of each."""
    of = [folder_of(seed, recipe) for seed in seeds]
    claims = [Job(CLAIMS_STAGE, store, name, recipe, (seed,)) for name, seed in zip(of, seeds, strict=True)]
    return [job for seed in seeds for job in replication.replication(store, seed, recipe)] + claims


def replications_of(store: ArtifactStore, seeds: Sequence[int], recipe: Recipe) -> list[Job]:
    """Return the jobs of a recipe's replications and of its controls, which learn from the first of them."""
    controls = [*replication.controls(store, seeds[0], recipe), measure.control_claims(store, recipe)]
    return jobs(store, seeds, recipe) + controls


def scorecard_job(store: ArtifactStore) -> Job:
    """Return the job of the scorecard over the replications that decide."""
    return Job(measure.MEASURE_ROWS["scorecard"], store, seeds=tuple(seeds_that_decide(store)))


def is_kept(name: str, deciding: Sequence[int]) -> bool:
    """Return whether `data/` holds an artifact of the post's recipe: models of those that decide, tables of all."""
    folder, _, file = name.rpartition("/")
    seed = folder.rpartition("seed_")[2]
    return replication.is_shipped(name) and (file != "model" or not seed.isdigit() or int(seed) in deciding)


def run_jobs(jobs: Sequence[Job], workers: int, scheduler: str | None, say: Say) -> None:
    """Run jobs, in the order in which one needs the other. Raises ArtifactError naming those that failed."""
    if failed := failures(run_graph(jobs, workers, scheduler, say)):
        raise ArtifactError(f"{', '.join(failed)} failed; the same command goes on where they stopped")
