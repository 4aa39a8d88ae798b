"""Several replications at once, a process each, and the table of how they did against the bars.

A replication is made stage by stage, and each stage leaves whole artifacts: one whose process dies is begun again
where it stopped, and so is all of it by the next call.
"""

import os
import re
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from typing import Any

import pandas as pd
from tqdm import tqdm

from dtbook.artifacts.store import ArtifactStore
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import Recipe, Report, name_of, replicate
from dtbook.rollout import calibration_error
from dtbook.trajectories.ppo import one_thread

ATTEMPTS = 2  # at a replication whose process was killed
TABLE = "replicas.parquet"
"""The name of `summary`'s table in a store."""

BARS = {
    "greedy 0.9": (0.93, 1.0),
    "greedy -1": (-1.0, -0.95),
    "sampled 0": (-0.05, 0.05),
    "survived 0": (0.85, 1.0),
    "error": (0.0, 0.1),
}
"""Lowest and highest value of each measure of `summary` that a replication must keep to."""


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that "0-9" or "0,3,5-7" names, each once, in order; raise ValueError for anything else."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"seeds must be numbers and rising ranges like 0-9 or 0,3,5-7, not {text!r}")
        seeds |= dict.fromkeys(range(int(found[1]), int(found[2] or found[1]) + 1))
    return list(seeds)


def replicate_all(
    store: ArtifactStore,
    seeds: Sequence[int],
    workers: int,
    report: Report,
    recipe: Recipe | None = None,
) -> dict[int, int]:
    """Make the replications in `workers` processes at a time; return the exit codes of those that failed.

    `report` is called in those processes, so it must be a function of a module.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    queue, failed = [(seed, 1) for seed in seeds], {}
    running: list[tuple[SpawnProcess, int, int]] = []
    try:
        while queue or running:
            while queue and len(running) < workers:
                seed, attempt = queue.pop(0)
                running.append((_start(store, seed, recipe, report), seed, attempt))
            connection.wait([process.sentinel for process, _, _ in running])
            for process, seed, attempt in [entry for entry in running if not entry[0].is_alive()]:
                running.remove((process, seed, attempt))
                code = process.exitcode or 0
                if code < 0 and attempt < ATTEMPTS:  # killed
                    queue.insert(0, (seed, attempt + 1))
                elif code:
                    failed[seed] = code
    finally:
        for process, _, _ in running:
            process.terminate()
            process.join()
    return failed


def _start(store: ArtifactStore, seed: int, recipe: Recipe | None, report: Report) -> SpawnProcess:
    arguments = (store, seed, recipe, False, report)
    process = get_context("spawn").Process(target=_replicate, args=arguments, daemon=True)
    process.start()
    return process


def _replicate(*arguments: Any) -> None:
    """Make a replication, and end with the process that asked for it: nobody else knows that it goes on."""
    if asked := parent_process():
        threading.Thread(target=_end_with, args=(asked.sentinel,), daemon=True).start()
    replicate(*arguments)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def in_processes(jobs: Sequence[Callable[[], object]], workers: int, label: str) -> None:
    """Do independent jobs, which must pickle, in `workers` processes of one thread, begun in their order."""
    with get_context("spawn").Pool(max(1, min(workers, len(jobs)))) as pool:
        done = pool.imap_unordered(_do, jobs)
        for _ in tqdm(done, total=len(jobs), desc=label):
            pass


def _do(job: Callable[[], object]) -> None:
    with one_thread():
        job()


def summary(store: ArtifactStore, seeds: Sequence[int]) -> pd.DataFrame:
    """Return one row a replication: what `BARS` bounds, the heads' obstacle scores, and which bars it missed.

    `greedy` and `sampled`: mean return when asked for −1, 0, 0.9; `survived 0`: share of sampled episodes still
    running at the end; `error`: mean absolute error of the sampled curve over RTG 0 … 0.9; `L0H1`: score of head 1.
    """
    rows = []
    for seed in seeds:
        curves = pd.read_parquet(store.path(name_of(seed, "calibration.parquet")))
        row: dict[str, float] = {"seed": seed, **measures(curves)}
        missed = [name for name, (low, high) in BARS.items() if not low <= row[name] <= high]
        model = DecisionTransformer.from_pretrained(store.path(name_of(seed, "model")))
        scores: dict[str, float] = model.metadata["obstacle_head"]["score"]
        rows.append({**row, **scores, "meets": not missed, "missed": ", ".join(missed)})
    return pd.DataFrame(rows)


def write_summary(store: ArtifactStore, seeds: Sequence[int]) -> pd.DataFrame:
    """Write `summary` to the store as `TABLE`, and return it."""
    table = summary(store, seeds)
    with store.write(TABLE, stage="replicas", code=["dtbook.replicas"], seeds=seeds) as path:
        table.to_parquet(path, index=False)
    return table


def measures(curves: pd.DataFrame) -> dict[str, float]:
    """Return the measures of one model from its two calibration curves (`pipeline.calibrate`)."""
    row: dict[str, float] = {}
    for acting, curve in curves.groupby("acting"):
        means = curve.set_index(curve["rtg"].round(6))["mean"]
        row |= {f"{acting} {rtg:g}": float(means[rtg]) for rtg in (-1.0, 0.0, 0.9)}
    sampled = curves[curves["acting"] == "sampled"]
    survived = sampled["survived"][sampled["rtg"].abs() < 1e-9]
    return row | {"survived 0": float(survived.iloc[0]), "error": calibration_error(sampled)}
