"""The experiments of chapters 11 and 12: sweeps collected into tables, training runs traced, C25 to C28 decided.

What is trained, and how long, stands in `sweeps/*.yml`, which `dtbook sweep` runs. Here its models are measured.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dtbook.analysis.attribution import channel_slices, preference_direction
from dtbook.analysis.dynamics import Probe, forward_probability, inspect, make_probe
from dtbook.analysis.weights import CELLS, front_cell_table, state_maps
from dtbook.artifacts.store import CHECKOUT, ArtifactError, ArtifactStore
from dtbook.claims.evidence import FRONT_ROWS
from dtbook.claims.rules import meets
from dtbook.claims.training_rules import MENDED, WITHOUT
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import FRONT
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline.engine import Job, Writer, table_row, table_writer
from dtbook.pipeline.measure import EXPERIMENT_CLAIMS
from dtbook.pipeline.recipes import COLLECTED, RECIPE_STAGES, WATCHED_SEEDS, circuit_delay, recipe_graph
from dtbook.pipeline.replication import (
    POST_RECIPE,
    Recipe,
    folder_of,
)
from dtbook.pipeline.sweep import Point, read_sweep
from dtbook.protocol import HIGH
from dtbook.rollout import calibration_row

SWEEPS = ("encodings", "weight_decay", "size")
"""The files in `sweeps/`, in the order in which they are run."""
FRONT_CELLS = "experiments/front_cells.parquet"
POST_PATHS = "post/front_paths.parquet"
SHAPE = {"n_layers": 1, "d_model": 128, "n_heads": 2, "n_timesteps": 1}
"""The shape that the post settled on (C27)."""
WATCHED = f"{POST_RECIPE}/seed_{{seed}}/along.parquet"
"""Trainings that were watched, which decide C28."""
SEEDS_A_SHAPE = 3
"""What C27 needs of each: one run is no replication."""


def table_of(sweep: str) -> str:
    """The artifact that holds a sweep's table."""
    return f"experiments/{sweep}.parquet"


# ------------------------------------------------------------------------------------------- sweeps, collected
def _collect(job: Job) -> list[Writer]:
    """Measure every model of a sweep that has been run, one row each; of `encodings`, keep the front cells too."""
    probe = make_probe(job.recipe.task)
    rows, fronts = [], []
    for point in tqdm(job.given, desc=str(job), disable=not job.progress):
        row, cells = measure_point(point, job.path(point.artifact), probe)
        rows.append(row)
        fronts.append(cells.assign(**point.settings))
    tables = [pd.DataFrame(rows), pd.concat(fronts, ignore_index=True)]
    return [table_writer(table) for table in tables[: len(job.makes)]]


def measure_point(point: Point, folder: Path, probe: Probe) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return a model's row, and what its front cell adds to F−R (`front_cells`).

    The row has the point's settings, what the stage said of it, the shares of episodes that reach the goal when asked
    for 0.9, `dynamics.inspect` and `state_channel`, the largest weight of the channel that is always 0.
    """
    model = DecisionTransformer.from_pretrained(folder / "model")
    row = point.settings | json.loads((folder / "row.json").read_text(encoding="utf-8"))
    curves = pd.read_parquet(folder / "calibration.parquet")
    row |= calibration_row(curves, dict.fromkeys(("succeeded", "survived", "died"), (HIGH,)))
    row |= inspect(model, probe) | {"state_channel": _largest_state_weight(model)}
    return row, front_cells(model)


def _largest_state_weight(model: DecisionTransformer) -> float:
    """Of the rows that no observation lights: the state channel, or the one-hot states that are never seen."""
    unused = channel_slices(model)["state"]
    if model.cfg.encoding == "one-hot":
        unused = slice(unused.start + 1, unused.stop)  # state 0 is in every cell
    rows = model.W_E_state.detach().unflatten(0, (model.cfg.n_channels, -1))[unused]
    return float(rows.abs().max())


def front_cells(model: DecisionTransformer) -> pd.DataFrame:
    """Return what the front cell adds directly to F−R (logits): `kind`, `name`, `value`.

    Kind "thing": all of a thing, as in `weights.front_cell_table`; else one of minigrid's channels, and `name` is the
    index that lights a one-hot bit, or "unit" for the weight of an index.
    """
    things = front_cell_table(model)["contribution"]
    rows = [{"kind": "thing", "name": str(name), "value": float(value)} for name, value in things.items()]
    front = state_maps(model, "F-R")[(slice(None), *FRONT)]
    for channel, part in channel_slices(model).items():
        for index, value in enumerate(front[part].tolist()):
            name = "unit" if model.cfg.encoding == "index" else str(index)
            rows.append({"kind": channel, "name": name, "value": value})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------- from an obstacle to the goal, by degrees
_OBSTACLE, _GOAL = CELLS["obstacle"], CELLS["goal"]


@torch.inference_mode()
def along_front_cell(
    model: DecisionTransformer, observations: ObservationSet, shares: Sequence[float], rtg: float
) -> pd.DataFrame:
    """Return how a model acts as the front cell turns from an obstacle (share 0) into the goal (share 1); t = `AT`.

    All else in the view is as observed. Path "object" moves the object's index from 6 to 8 and leaves the colour an
    obstacle's, path "both" moves the colour's from 2 to 1 as well. In between there is nothing in the task: the
    fraction goes through the weights, which are linear where a cell enters. Columns: `path`, `share`, `object`,
    `forward` (weighted mean probability), `direct` (what the cell's two weights add to F−R, logits). Raises ValueError
    for a model that sees one-hot cells, which have nothing in between.
    """
    if model.cfg.encoding != "index":
        raise ValueError(f"model has the {model.cfg.encoding} encoding; only indices have values in between.")
    images = observations.images.copy()
    images[:, *FRONT] = _OBSTACLE
    start = replace(observations, images=images)
    weights, direction = model.W_E_state[list(FRONT_ROWS.values())], preference_direction(model, "F-R")
    rows = []
    for path, colour in (("object", 0.0), ("both", float(_GOAL[1] - _OBSTACLE[1]))):
        for share in shares:
            step = share * torch.tensor([float(_GOAL[0] - _OBSTACLE[0]), colour])
            moved = step @ weights
            with model.hooks([("hook_state_embed", lambda embed, hook, moved=moved: embed + moved)]):
                forward = forward_probability(model, start, rtg)
            codes = torch.tensor(_OBSTACLE[:2], dtype=torch.float32) + step
            direct = float(codes @ weights @ direction)
            rows.append(
                {
                    "path": path,
                    "share": share,
                    "object": float(codes[0]),
                    "forward": forward,
                    "direct": direct,
                }
            )
    return pd.DataFrame(rows)


def front_paths(
    model: DecisionTransformer, probe: Probe, rtgs: Sequence[float] = (-1.0, 0.9)
) -> pd.DataFrame:
    """Return `along_front_cell` at these RTGs in views that show an obstacle and in views that show the goal in front.

    Columns `view` and `rtg` say which.
    """
    tables = [
        along_front_cell(model, probe.facing[view], [k / 8 for k in range(9)], rtg).assign(view=view, rtg=rtg)
        for view in ("obstacle", "goal")
        for rtg in rtgs
    ]
    return pd.concat(tables, ignore_index=True)


def _post_paths(job: Job) -> list[Writer]:
    return [table_writer(front_paths(job.subject().model, make_probe(job.recipe.task)))]


# --------------------------------------------------------------------------------------------- claims, decided
def decide_on_training(
    encodings: pd.DataFrame | None, size: pd.DataFrame | None, watched: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return what the experiments say to C25 to C28: `model` (which run), `claim`, `effect`, `passed`, `n` (models).

    A claim whose table is None is left out. C25 and C26 are decided by models of a history whose classes are not
    balanced, and undecided where there are none; C27 is undecided where a shape has fewer than three seeds. `watched`
    maps runs to tables of `recipes.along`, by which C28 is decided.
    """
    rows = [] if encodings is None else [*_over_sampling(encodings)]
    rows += [] if size is None else [_shape(size)]
    for run, table in watched.items():
        ratio = circuit_delay(table)["ratio"]
        passed = np.nan if np.isnan(ratio) else float(meets("C28", ratio))
        rows.append({"model": run, "claim": "C28", "effect": ratio, "passed": passed, "n": 1})
    return pd.DataFrame(rows).sort_values(["claim", "model"], ignore_index=True)


def _over_sampling(encodings: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Decide C25 and C26 by the models that were trained on a history; where there are none, show the others."""
    own = encodings[_are_on_history(encodings)]
    decided, models = (1.0, own) if len(own) else (np.nan, encodings)
    success = models.set_index(["encoding", "last_step_share", "seed"])["greedy succeeded 0.9"]
    share = float(models["last_step_share"].max())
    for seed in sorted(models["seed"].unique()):
        without, mended = float(success["index", 0.0, seed]), float(success["index", share, seed])
        passed = WITHOUT.meets(without) and MENDED.meets(mended)
        run = {"model": f"transformer seed {seed}"}
        yield run | {"claim": "C25", "effect": mended - without, "passed": float(passed) * decided, "n": 2}
        alone = float(success["one-hot", 0.0, seed])
        yield run | {"claim": "C26", "effect": alone, "passed": float(meets("C26", alone)) * decided, "n": 1}


def _are_on_history(models: pd.DataFrame) -> pd.Series:
    """Return which models learnt from a history whose classes are not balanced, which C25 and C26 are about."""
    if not {"data", "balance_classes"} <= {*models.columns}:
        return pd.Series(False, models.index)
    return models["data"].str.endswith("history.npz") & ~models["balance_classes"].astype(bool)


def shape_gaps(size: pd.DataFrame) -> pd.DataFrame:
    """Return by how much the best mean return at 0.9 of the sweep exceeds each shape's: `greedy`, `sampled`."""
    return pd.DataFrame({how: size[f"{how} 0.9"].max() - size[f"{how} 0.9"] for how in ("greedy", "sampled")})


def _shape(size: pd.DataFrame) -> dict[str, Any]:
    by_shape = size.groupby(list(SHAPE))
    seeds, means = by_shape.size().min(), by_shape.mean(numeric_only=True).reset_index()
    ours = (means[list(SHAPE)] == pd.Series(SHAPE)).all(axis=1)
    gap = float(shape_gaps(means)[ours].max(axis=1).iloc[0])
    passed = float(meets("C27", gap)) if seeds >= SEEDS_A_SHAPE else np.nan
    return {"model": "sweep", "claim": "C27", "effect": gap, "passed": passed, "n": len(size)}


def _experiment_claims(job: Job) -> list[Writer]:
    """Decide those of C25 to C28 that the store has tables for: sweeps, and trainings by the post's recipe, watched."""
    encodings, size = (
        job.table(name) if job.has(name) else None for name in map(table_of, ("encodings", "size"))
    )
    runs = [f"{POST_RECIPE}/{folder_of(seed)}" for seed in job.seeds]
    watched = {run: job.table(f"{run}/along.parquet") for run in runs if job.has(f"{run}/along.parquet")}
    if encodings is None and size is None and not watched:
        raise ArtifactError(f"{job.store.root} has neither tables of sweeps nor trainings that were watched")
    return [table_writer(decide_on_training(encodings, size, watched))]


# ------------------------------------------------------------------------------------------- the table, and its graph
EXPERIMENT_STAGES = (
    *(
        table_row(
            f"collect {sweep}",
            _collect,
            f"{table_of(sweep)} {FRONT_CELLS if sweep == 'encodings' else ''}",
            before=f"dtbook sweep sweeps/{sweep}.yml",
        )
        for sweep in SWEEPS
    ),
    *RECIPE_STAGES,
    table_row("front paths", _post_paths, POST_PATHS, "post/model"),
    table_row(
        "experiment claims",
        _experiment_claims,
        EXPERIMENT_CLAIMS,
        uses=" ".join([table_of("encodings"), table_of("size"), WATCHED]),
        recipe="",
        before="dtbook experiments",
    ),
)
EXPERIMENT_ROWS = {stage.name: stage for stage in EXPERIMENT_STAGES}


def collected(store: ArtifactStore, sweep: str, points: Sequence[Point], folder: Path, recipe: Recipe) -> Job:
    """Return the job that measures what a sweep has left in `folder`."""
    stage = replace(EXPERIMENT_ROWS[f"collect {sweep}"], needs=tuple(point.artifact for point in points))
    source = ArtifactStore(folder / sweep)
    return Job(stage, store, recipe=recipe, source=source, given=points)


def graph(store: ArtifactStore, folder: Path, recipe: Recipe, post: bool = True) -> list[Job]:
    """Return the jobs of chapters 11 and 12: sweeps collected, claims decided.

    The sweeps have been run, or are run with them, in `folder`.
    """
    jobs = [collected(store, sweep, read(sweep), folder, recipe) for sweep in SWEEPS]
    if post:
        jobs.append(Job(EXPERIMENT_ROWS["front paths"], store, "post", recipe, label="post front paths"))
    claims = Job(EXPERIMENT_ROWS["experiment claims"], store, seeds=WATCHED_SEEDS[POST_RECIPE])
    return [*jobs, claims]


def graph_of_chapters(store: ArtifactStore, made: ArtifactStore, folder: Path) -> list[Job]:
    """Return the jobs of `graph` and of `recipes.recipe_graph`, by whose watched trainings C28 is decided."""
    swept = {name: read(name) for name in COLLECTED}
    return recipe_graph(store, made, swept, folder) + graph(store, folder, Recipe())


def read(sweep: str) -> list[Point]:
    """Return the points of one of `SWEEPS`."""
    return read_sweep(CHECKOUT / "sweeps" / f"{sweep}.yml", CHECKOUT / "notebooks")
