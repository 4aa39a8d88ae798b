"""What decides whether the post's circuit comes back: two recipes part by part, and one model along its training.

What is trained stands in `sweeps/recipes.yml`: each of three factors is as in the post or as in the book's first
edition, which makes eight cells. Here the models are measured; `analysis.stats.factor_effects` says what a factor does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dtbook.analysis import faithfulness, program
from dtbook.analysis.dynamics import TOLERANCE, moved_from, settles, weight_norms
from dtbook.analysis.stats import factor_effects
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.claims.evidence import Evidence
from dtbook.claims.rules import decide_claims
from dtbook.gridworld.env import ObservationSet
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline.engine import Job, Writer, table_row, table_writer
from dtbook.pipeline.measure import observations_of, start_of_rtg
from dtbook.pipeline.replication import (
    POST_RECIPE,
    Recipe,
    calibrate,
    calibration_of,
    folder_of,
    load_snapshots,
    seeds_with,
)
from dtbook.pipeline.sweep import Point
from dtbook.rollout import calibration_row

SWEEP, TRIED = "recipes", "book_recipe"
RECIPE_CLAIMS, RECIPE_MODELS = "experiments/recipes.parquet", "experiments/recipe_models.parquet"
RECIPES_TRIED = "experiments/recipes_tried.parquet"
"""The trainings by which the book's recipe was chosen."""
FACTORS = {"start": ("post", "first"), "data": ("history", "quota"), "optimiser": ("post", "first")}
"""The columns of a cell, and the levels of each: the post's, and that of the book's first edition."""
WATCHED_SEEDS = {POST_RECIPE: (0, 1, 11), "": (10, 11, 12)}
"""Replications whose training is watched: by the post's recipe the first, and the two with the most of the circuit."""
CASE = faithfulness.CIRCUIT_CASES[0]
"""The behaviour whose smallest circuit is looked for along training: avoiding an obstacle when asked for 0.9."""
OVER = 100
"""Updates that a loss along training is the mean of."""
WITHIN_A_FACTOR_OF_TWO = 1.0
"""How near its end a circuit's size must stay to be settled, in powers of two."""


# ------------------------------------------------------------------------------------------- one model, measured
def measure_model(
    model: DecisionTransformer,
    observations: ObservationSet,
    calibration: pd.DataFrame,
    start: Float[Tensor, " d_model"],
) -> tuple[dict[str, float], pd.DataFrame]:
    """Return what is kept of a model with heads in order, one row; and its findings (`claim`, `effect`, `passed`).

    The row: `score L0H0` and `score L0H1`, the obstacle scores (shares); the bars of behaviour as `calibration_row` has
    them (returns, shares, error); `weight_norms`; and `distance W_E_rtg`, `cosine W_E_rtg`, how far the RTG embedding
    is from its `start`.
    """
    evidence = Evidence(model, observations, calibration, start=start)
    row = {f"score L0H{head}": score for head, score in enumerate(evidence.head_scores)}
    row |= calibration_row(calibration) | weight_norms(model)
    row |= {f"{name} W_E_rtg": value for name, value in moved_from(model.W_E_rtg, start).items()}
    return row, decide_claims(evidence)


# ------------------------------------------------------------------------------------------- the sweep, collected
def _collect(job: Job) -> list[Writer]:
    """Measure every model of the sweep that is there: a row a point and claim, and a row a point."""
    observations, claims, models = observations_of(job.recipe.task), [], []
    for point in tqdm(job.given, desc=str(job), disable=not job.progress):
        cell = cell_of(point)
        row, found = _measure_point(
            job.path(point.artifact) / folder_of(cell["seed"]), cell["seed"], observations
        )
        claims.append(pd.concat([pd.DataFrame([cell] * len(found)), found], axis=1))
        models.append(cell | row)
    return [table_writer(pd.concat(claims, ignore_index=True)), table_writer(pd.DataFrame(models))]


def cell_of(point: Point) -> dict[str, Any]:
    """Return which cell a point of the sweep belongs to: `point`, the factors by their levels, and `seed`."""
    given = point.parameters
    optimiser = "post" if given["train.schedule"] == "constant" else "first"
    cell = {"start": given["model.init"], "data": given["episodes"], "optimiser": optimiser}
    return {"point": point.id, **cell, "seed": given["seed"]}


def _measure_point(
    folder: Path, seed: int, observations: ObservationSet
) -> tuple[dict[str, float], pd.DataFrame]:
    model = DecisionTransformer.from_pretrained(folder / "model")
    calibration = pd.read_parquet(folder / "calibration.parquet")
    return measure_model(model, observations, calibration, start_of_rtg(model.cfg, seed))


def collected_recipes(
    store: ArtifactStore, points: Sequence[Point], folder: Path, recipe: Recipe, sweep: str = SWEEP
) -> Job:
    """Return the job that measures the points which the sweep has left in `folder`, all or as many as there are.

    Raises ArtifactError where there is none yet.
    """
    source, stage = ArtifactStore(folder / sweep), COLLECTED[sweep]
    entries = source.entries()
    there = [point for point in points if point.artifact in entries]
    if not there:
        raise ArtifactError(f"{source.root} has no point of {sweep}: `{stage.before}` makes them")
    stage = replace(stage, needs=tuple(point.artifact for point in there))
    return Job(stage, store, recipe=recipe, source=source, given=there)


def _collect_tried(job: Job) -> list[Writer]:
    """Keep of each training by which a recipe was chosen its settings, its behaviour and where its RTG embedding is."""
    rows = []
    for point in job.given:
        folder = job.path(point.artifact)
        model = DecisionTransformer.from_pretrained(folder / "model")
        row = point.settings | calibration_row(pd.read_parquet(folder / "calibration.parquet"))
        moved = moved_from(model.W_E_rtg, start_of_rtg(model.cfg, point.parameters["seed"]))
        rows.append(row | {"cosine W_E_rtg": moved["cosine"]})
    return [table_writer(pd.DataFrame(rows))]


def claim_effects(claims: pd.DataFrame) -> pd.DataFrame:
    """Return `factor_effects` on each claim's effect: `claim`, `term`, `effect`, `low`, `high`, `n`.

    `claims` is the table of the sweep; a claim whose effect no seed has in every cell has no rows.
    """
    effects = {
        claim: factor_effects(part, FACTORS, "effect") for claim, part in claims.groupby("claim", sort=False)
    }
    tables = [table.assign(claim=claim) for claim, table in effects.items() if len(table)]
    columns = ["claim", "term", "effect", "low", "high", "n"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


# ------------------------------------------------------------------------------------------- along a training
def _along(job: Job) -> list[Writer]:
    """Measure a replication's snapshots; head numbers are those of the finished model."""
    models = load_snapshots(job.origin, job.seed, job.recipe)
    settings = calibration_of(job.recipe) | {"episodes": job.settings["episodes"]}
    table = along(models, observations_of(job.recipe.task), settings, job.seed, job.progress)
    table["loss"] = loss_before(
        job.table("{of}/training.parquet")["loss"].to_numpy(), table["step"].to_numpy()
    )
    return [table_writer(table)]


def loss_before(
    losses: Float[np.ndarray, " update"], steps: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Return the mean training loss (nats) of the `OVER` updates before each step, or of as many as there were.

    Before the first update there is none: NaN.
    """
    return np.array([losses[max(0, step - OVER) : step].mean() if step else np.nan for step in steps])


def along(
    models: Mapping[int, DecisionTransformer],
    observations: ObservationSet,
    calibration: Mapping[str, Any],
    seed: int,
    progress: bool = False,
) -> pd.DataFrame:
    """Return one row a snapshot of a training run, the first of which is its start.

    Columns: `step` (optimiser steps before it); those of `measure_model`; each claim's effect and whether it passes,
    "C09" and "C09 passed"; `circuit_measures`. `calibration` are the settings of `calibrate`. A snapshot of the book's
    model takes about 17 s of a processor.
    """
    start = models[min(models)].W_E_rtg.detach()
    rows = []
    for step, model in tqdm(models.items(), desc="along training", disable=not progress):
        row, found = measure_model(model, observations, calibrate(model, calibration, seed), start)
        row |= dict(zip(found["claim"], found["effect"], strict=True))
        row |= dict(zip(found["claim"] + " passed", found["passed"], strict=True))
        rows.append({"step": step} | row | circuit_measures(model, observations, seed))
    return pd.DataFrame(rows).sort_values("step", ignore_index=True)


def circuit_measures(model: DecisionTransformer, observations: ObservationSet, seed: int) -> dict[str, float]:
    """Return how much of a model can be said in short.

    `circuit size`: units of the smallest circuit found that keeps `faithfulness.KEEP` of obstacle avoidance at 0.9, NaN
    where none of at most `faithfulness.MOST` neurons does; `circuit share`: what that one, or the best, keeps.
    `explained trigram` and `explained`: the share of the model's behaviour (KL, over all observations) that the table
    of RTG band and front cell explains, and that the largest table does.
    """
    rows = faithfulness.case_rows(observations, CASE, seed)
    circuit = faithfulness.smallest_circuit(model, rows, seed)
    share = float(circuit["share"].iloc[-1])
    size = float(circuit["size"].iloc[-1]) if share >= faithfulness.KEEP else np.nan
    summary = program.summarise_model(model, observations)
    nothing, trigram, largest = (
        program.Program(summary, step).kl for step in (program.STEPS[0], program.TRIGRAM, program.STEPS[-1])
    )
    explained = {"explained trigram": 1 - trigram / nothing, "explained": 1 - largest / nothing}
    return {"circuit size": size, "circuit share": share} | explained


def circuit_delay(table: pd.DataFrame) -> dict[str, float]:
    """Return the steps at which `returns`, `explained` and `size` settle along a training, and their `ratio` (C28).

    Returns are those at 0.9, greedy and sampled, and settle within 0.1 of the end, as does the share that the trigram
    explains; the size of the smallest circuit within a factor of two. The ratio is the later of the last two ÷ the
    first. Where the training ends without a faithful circuit, size and ratio are NaN; likewise the ratio where returns
    are settled from the start.
    """
    steps, sizes = table["step"].to_numpy(), np.log2(table["circuit size"].to_numpy(np.float64))
    returns = settles(steps, table[["greedy 0.9", "sampled 0.9"]].to_numpy(), TOLERANCE)
    explained = settles(steps, table["explained trigram"].to_numpy(), TOLERANCE)
    ends = np.isfinite(sizes[-1])
    size = settles(steps, sizes, WITHIN_A_FACTOR_OF_TWO) if ends else np.nan
    ratio = max(explained, size) / returns if returns and ends else np.nan
    return {"returns": returns, "explained": explained, "size": size, "ratio": ratio}


# ------------------------------------------------------------------------------------------- the table, and its graph
COLLECT = table_row(
    f"collect {SWEEP}",
    _collect,
    f"{RECIPE_CLAIMS} {RECIPE_MODELS}",
    before=f"dtbook sweep sweeps/{SWEEP}.yml",
)
COLLECT_TRIED = table_row(
    f"collect {TRIED}",
    _collect_tried,
    RECIPES_TRIED,
    before=f"dtbook sweep sweeps/{TRIED}.yml",
)
COLLECTED = {SWEEP: COLLECT, TRIED: COLLECT_TRIED}
ALONG = table_row(
    "along training",
    _along,
    "{of}/along.parquet",
    "{of}/snapshots.safetensors {of}/model {of}/training.parquet",
    recipe="task calibration",
    episodes=100,
)
RECIPE_STAGES = (COLLECT, COLLECT_TRIED, ALONG)


def recipe_graph(
    store: ArtifactStore, made: ArtifactStore, swept: Mapping[str, Sequence[Point]], folder: Path
) -> list[Job]:
    """Return the jobs of chapter 12: its sweeps, of name `swept`, collected as far as they are there, and trainings.

    A training is watched where `made` has its snapshots (`WATCHED_SEEDS`).
    """
    jobs = [
        collected_recipes(store, points, folder, Recipe.post(), sweep)
        for sweep, points in swept.items()
        if {point.artifact for point in points} & ArtifactStore(folder / sweep).entries().keys()
    ]
    for recipe in (Recipe.post(), Recipe()):
        there = seeds_with(made, "snapshots.safetensors", recipe.folder)
        for seed in WATCHED_SEEDS[recipe.folder]:
            if seed in there:
                jobs.append(Job(ALONG, store, folder_of(seed, recipe), recipe, (seed,), source=made))
    return jobs
