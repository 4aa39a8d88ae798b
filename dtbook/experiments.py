"""The experiments of chapters 11 and 12: sweeps collected into tables, training runs traced, C25 to C28 decided.

What is trained, and how long, stands in `sweeps/*.yml`, which `dtbook sweep` runs. Here its models are measured.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from dtbook.analysis.attribution import channel_slices, preference_direction
from dtbook.analysis.dynamics import Probe, forward_probability, inspect, make_probe, settles, trace
from dtbook.analysis.weights import CELLS, front_cell_table, state_maps
from dtbook.artifacts.store import ArtifactError, ArtifactStore
from dtbook.claims.rules import meets
from dtbook.claims.training_rules import MENDED, WITHOUT
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.rules import FRONT
from dtbook.model.files import POST_MODEL_SHA256
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline import Writer, load_snapshots, name_of, run_stage, table_writer
from dtbook.sweep import Point, read_sweep

SWEEPS = ("encodings", "weight_decay", "size")
"""The files in `sweeps/`, in the order in which they are run."""
FRONT_CELLS = "experiments/front_cells.parquet"
CLAIMS = "experiments/claims.parquet"
POST_PATHS = "post/front_paths.parquet"
SHAPE = {"n_layers": 1, "d_model": 128, "n_heads": 2, "n_timesteps": 1}
"""The shape that the post settled on (C27)."""

Row = dict[str, Any]


def table_of(sweep: str) -> str:
    """The artifact that holds a sweep's table."""
    return f"experiments/{sweep}.parquet"


# ------------------------------------------------------------------------------------------- sweeps, collected
def collect(store: ArtifactStore, sweep: str, checkout: Path, folder: Path, progress: bool = True) -> None:
    """Measure every model of a sweep that has been run in `folder`, and keep one row a model in the store.

    Raises ArtifactError where the sweep is not complete. Of `encodings`, the front cells are kept too.
    """
    points = read_sweep(checkout / "sweeps" / f"{sweep}.yml", checkout / "notebooks")
    made = ArtifactStore(folder / sweep)
    entries = made.entries()
    if missing := [point for point in points if point.artifact not in entries]:
        raise ArtifactError(
            f"{made.root} lacks {len(missing)} of {len(points)} points: `dtbook sweep sweeps/{sweep}.yml` makes them"
        )
    hashes = {point.id: entries[point.artifact]["sha256"] for point in points}
    names = [table_of(sweep)] + ([FRONT_CELLS] if sweep == "encodings" else [])

    def make() -> list[Writer]:
        probe = make_probe()
        rows: list[Row] = []
        fronts: list[pd.DataFrame] = []
        for point in tqdm(points, desc=sweep, disable=not progress):
            row, cells = measure_point(point, made.path(point.artifact), probe)
            rows.append(row)
            fronts.append(cells.assign(**_settings(point)))
        frames = [pd.DataFrame(rows), pd.concat(fronts, ignore_index=True)]
        return [table_writer(frame) for frame in frames[: len(names)]]

    run_stage(
        store,
        0,
        f"collect {sweep}",
        (
            "dtbook.analysis.dynamics",
            "dtbook.rollout",
        ),
        {"points": hashes},
        names,
        make,
    )


def measure_point(point: Point, folder: Path, probe: Probe) -> tuple[Row, pd.DataFrame]:
    """Return a model's row, and what its front cell adds to F−R (`front_cells`).

    The row has the point's settings, what the stage said of it, the shares of episodes that reach the goal when asked
    for 0.9, `dynamics.inspect` and `state_channel`, the largest weight of the channel that is always 0.
    """
    model = DecisionTransformer.from_pretrained(folder / "model")
    row = _settings(point) | json.loads((folder / "row.json").read_text(encoding="utf-8"))
    curves = pd.read_parquet(folder / "calibration.parquet").set_index(["acting", "rtg"])
    for acting in ("greedy", "sampled"):
        for column in ("succeeded", "survived", "died"):
            row[f"{acting} {column} 0.9"] = float(curves[column][acting, 0.9])
    row |= inspect(model, probe) | {"state_channel": _largest_state_weight(model)}
    return row, front_cells(model)


def _settings(point: Point) -> Row:
    """The point's settings by their last names, without lists: `model.n_layers` is `n_layers`."""
    given = {
        name.rpartition(".")[2]: value
        for name, value in point.parameters.items()
        if not isinstance(value, list)
    }
    return {"point": point.id} | given


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
OBSTACLE, GOAL = CELLS["obstacle"], CELLS["goal"]
FRONT_ROWS = (26, 75)
"""Rows of W_E_state for object and colour of the front cell, in the index encoding."""


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
    images[:, *FRONT] = OBSTACLE
    start = replace(observations, images=images)
    weights, direction = model.W_E_state[list(FRONT_ROWS)], preference_direction(model, "F-R")
    rows = []
    for path, colour in (("object", 0.0), ("both", float(GOAL[1] - OBSTACLE[1]))):
        for share in shares:
            step = share * torch.tensor([float(GOAL[0] - OBSTACLE[0]), colour])
            moved = step @ weights
            with model.hooks([("hook_state_embed", lambda embed, hook, moved=moved: embed + moved)]):
                forward = forward_probability(model, start, rtg)
            codes = torch.tensor(OBSTACLE[:2], dtype=torch.float32) + step
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


def measure_post_paths(store: ArtifactStore) -> None:
    """Keep `front_paths` of the post's own weights, which are fetched, or found, only where they are needed."""

    def make() -> list[Writer]:
        return [table_writer(front_paths(DecisionTransformer.from_post_checkpoint(), make_probe()))]

    run_stage(
        store,
        0,
        "front paths",
        ("dtbook.analysis.dynamics",),
        {"model": POST_MODEL_SHA256},
        [POST_PATHS],
        make,
    )


# ---------------------------------------------------------------------------------------- training, traced
def measure_dynamics(store: ArtifactStore, seed: int, made: ArtifactStore, progress: bool = True) -> None:
    """Trace a replication along its training: `seed_N/dynamics.parquet`, from the snapshots that `made` has of it.

    Head numbers are those of the finished model. Raises ArtifactError where `made` has no snapshots of the seed.
    """
    snapshots, final = name_of(seed, "snapshots.safetensors"), name_of(seed, "model")
    entries = made.entries()
    if snapshots not in entries:
        raise ArtifactError(
            f"{made.root} has no {snapshots}: `dtbook reproduce` keeps them when it trains the model"
        )

    def make() -> list[Writer]:
        models = load_snapshots(made, seed)
        return [table_writer(trace(models, make_probe(), seed=seed, progress=progress))]

    parameters = {name: entries[name]["sha256"] for name in (snapshots, final)}
    run_stage(
        store,
        seed,
        "dynamics",
        ("dtbook.analysis.dynamics", "dtbook.rollout"),
        parameters,
        [name_of(seed, "dynamics.parquet")],
        make,
    )


# --------------------------------------------------------------------------------------------- claims, decided
def decide(
    encodings: pd.DataFrame | None, size: pd.DataFrame | None, dynamics: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return what the experiments say to C25 to C28: `model` (which run), `claim`, `effect`, `passed`, `n` (models).

    A claim whose table is None is left out. `dynamics` maps runs to tables of `dynamics.trace`.
    """
    rows = [] if encodings is None else [*_over_sampling(encodings)]
    rows += [] if size is None else [_shape(size)]
    for run, traced in dynamics.items():
        ratio = interpretability_delay(traced)["ratio"]
        rows.append(
            {"model": run, "claim": "C28", "effect": ratio, "passed": float(meets("C28", ratio)), "n": 1}
        )
    return pd.DataFrame(rows).sort_values(["claim", "model"], ignore_index=True)


def _over_sampling(encodings: pd.DataFrame) -> Iterator[Row]:
    success = encodings.set_index(["encoding", "last_step_share", "seed"])["greedy succeeded 0.9"]
    share = float(encodings["last_step_share"].max())
    for seed in sorted(encodings["seed"].unique()):
        without, mended = float(success["index", 0.0, seed]), float(success["index", share, seed])
        passed = WITHOUT.meets(without) and MENDED.meets(mended)
        run = {"model": f"transformer seed {seed}"}
        yield run | {"claim": "C25", "effect": mended - without, "passed": float(passed), "n": 2}
        alone = float(success["one-hot", 0.0, seed])
        yield run | {"claim": "C26", "effect": alone, "passed": float(meets("C26", alone)), "n": 1}


def shape_gaps(size: pd.DataFrame) -> pd.DataFrame:
    """Return by how much the best mean return at 0.9 of the sweep exceeds each shape's: `greedy`, `sampled`."""
    return pd.DataFrame({how: size[f"{how} 0.9"].max() - size[f"{how} 0.9"] for how in ("greedy", "sampled")})


def _shape(size: pd.DataFrame) -> Row:
    ours = (size[list(SHAPE)] == pd.Series(SHAPE)).all(axis=1)
    gap = float(shape_gaps(size)[ours].max(axis=1).iloc[0])
    return {
        "model": "sweep",
        "claim": "C27",
        "effect": gap,
        "passed": float(meets("C27", gap)),
        "n": len(size),
    }


def interpretability_delay(traced: pd.DataFrame) -> dict[str, float]:
    """Return the steps at which `scores` and `returns` settle, and their `ratio` (C28).

    Scores of all heads together; the return at 0.9 greedy or sampled, whichever settles later.
    """
    steps = traced["step"].to_numpy()
    scores = settles(steps, traced.filter(like="score L").to_numpy())
    returns = settles(steps, traced[["greedy 0.9", "sampled 0.9"]].to_numpy())
    return {"scores": scores, "returns": returns, "ratio": scores / returns}


def decide_claims(store: ArtifactStore) -> None:
    """Decide those of C25 to C28 that the store has tables for: sweeps, and traces of replications.

    Raises ArtifactError where it has none.
    """
    entries, encodings, size = store.entries(), table_of("encodings"), table_of("size")
    traces = {
        f"seed_{seed}": name_of(seed, "dynamics.parquet") for seed in seeds_with(store, "dynamics.parquet")
    }
    sources = [name for name in (encodings, size, *traces.values()) if name in entries]
    if not sources:
        raise ArtifactError(f"{store.root} has neither {encodings} nor {size} nor traces of replications")

    def read(name: str) -> pd.DataFrame | None:
        return pd.read_parquet(store.path(name)) if name in entries else None

    def make() -> list[Writer]:
        traced = {run: pd.read_parquet(store.path(name)) for run, name in traces.items()}
        return [table_writer(decide(read(encodings), read(size), traced))]

    parameters = {"from": {name: entries[name]["sha256"] for name in sources}}
    run_stage(store, 0, "experiment claims", ("dtbook.analysis.dynamics",), parameters, [CLAIMS], make)


def run_all(
    store: ArtifactStore, made: ArtifactStore, checkout: Path, folder: Path
) -> Iterator[tuple[str, str]]:
    """Do whatever can be done; yield each part's name with "done" or the sentence that says what it lacks.

    The parts: each sweep run in `folder`, each replication that `made` has snapshots of, the claims over all that the
    store then holds.
    """
    parts: dict[str, Callable[[], None]] = {
        sweep: partial(collect, store, sweep, checkout, folder) for sweep in SWEEPS
    }
    for seed in seeds_with(made, "snapshots.safetensors"):
        parts[f"dynamics of seed {seed}"] = partial(measure_dynamics, store, seed, made)
    parts["the post's weights"] = partial(measure_post_paths, store)
    parts["claims"] = partial(decide_claims, store)
    for name, step in parts.items():
        try:
            step()
        except (ArtifactError, OSError) as error:
            yield name, str(error)
        else:
            yield name, "done"


def seeds_with(store: ArtifactStore, file: str) -> list[int]:
    """Return the replications of which a store has an artifact of that file name."""
    matches = (re.fullmatch(rf"seed_(\d+)/{re.escape(file)}", name) for name in store.entries())
    return sorted(int(match[1]) for match in matches if match)
