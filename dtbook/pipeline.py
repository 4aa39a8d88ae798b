"""From nothing to a replicated model: PPO, trajectories, Decision Transformer, calibration, stage by stage.

Each stage writes whole artifacts and says in their manifest what made them; a stage whose artifacts are there,
made by the same code from the same parameters, is not run again.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from dtbook import training
from dtbook.analysis import heads
from dtbook.artifacts.store import ArtifactStore
from dtbook.gridworld.env import DynamicObstaclesVectorEnv, all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.model.transformer import DecisionTransformer
from dtbook.rollout import CALIBRATION_RTGS, calibration_curve
from dtbook.training import TrainConfig
from dtbook.trajectories import ppo
from dtbook.trajectories.collection import QuotaConfig, collect_by_quota
from dtbook.trajectories.ppo import PPOConfig
from dtbook.trajectories.recording import RecordEpisodes, Trajectories

SHIPPED = (
    "ppo.parquet",
    "collection.parquet",
    "model",
    "training.parquet",
    "evaluations.parquet",
    "heads.parquet",
    "calibration.parquet",
)
"""What `data/` holds of each replication; of seed 0 also `REFERENCE_ONLY`. PPO's checkpoints are too large for git."""

REFERENCE_ONLY = ("history.npz", "trajectories.npz", "snapshots.safetensors")
POST_CALIBRATION = "post/calibration.parquet"
Report = Callable[[int, str, float], None]
"""Hears of a seed, a stage that is over, and the seconds it took."""

CONTROLS = tuple(f"controls/shuffled_{seed}" for seed in range(3))
"""Models trained on the reference's data set with its actions shuffled, which say nothing about what to do."""


@dataclass(frozen=True)
class Recipe:
    """All settings of one replication but its seed."""

    task: Task = Task()
    ppo: PPOConfig = PPOConfig(
        checkpoint_every=1
    )  # survivors, which return 0, are there for a few updates only
    envs: int = 64
    """Environments that PPO learns in at once."""
    quota: QuotaConfig = QuotaConfig()
    model: DTConfig = DTConfig()
    train: TrainConfig = TrainConfig()
    snapshots: tuple[int, ...] = (0, 50, 100, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 4800, 9000)
    """Training steps after which the weights are kept."""
    calibration: Mapping[str, Any] = field(
        default_factory=lambda: {"rtgs": list(CALIBRATION_RTGS), "episodes": 500, "max_steps": 300}
    )


def folder_of(seed: int) -> str:
    """Where a replication's artifacts lie in a store: `seed_0`, `seed_1` …"""
    return f"seed_{seed}"


def name_of(seed: int, file: str) -> str:
    """The name of a replication's artifact in a store."""
    return f"{folder_of(seed)}/{file}"


def replicate(
    store: ArtifactStore,
    seed: int,
    recipe: Recipe | None = None,
    progress: bool = True,
    report: Report | None = None,
) -> None:
    """Make every artifact of one replication in `store`, going on where an interrupted call stopped.

    `report` hears of each stage when it is over.
    """
    recipe = recipe or Recipe()
    with ppo.one_thread():
        for stage in (_ppo, _collection, _training, _heads, _calibration):
            start = time.perf_counter()
            stage(store, seed, recipe, progress)
            if report:
                report(seed, stage.__name__.strip("_"), time.perf_counter() - start)


def calibrate(model: DecisionTransformer, settings: Mapping[str, Any], seed: int) -> pd.DataFrame:
    """Greedy and sampled calibration curves of one model, told apart by the column `acting`."""
    curves = [
        calibration_curve(model, greedy=acting == "greedy", seed=seed, **settings).assign(acting=acting)
        for acting in ("greedy", "sampled")
    ]
    return pd.concat(curves, ignore_index=True)


def calibrate_post(store: ArtifactStore, recipe: Recipe | None = None) -> None:
    """Measure the calibration of the post's own weights, which are fetched or found where they are needed."""
    settings = dict((recipe or Recipe()).calibration)

    def make() -> list[Writer]:
        return [table_writer(calibrate(DecisionTransformer.from_post_checkpoint(), settings, 0))]

    run_stage(store, 0, "calibration", ("dtbook.rollout",), settings, [POST_CALIBRATION], make)


def shipped_names(seed: int = 0) -> list[str]:
    """What `data/` holds of a replication; of the reference's also the controls, and what the post's weights do."""
    if seed:
        return [name_of(seed, file) for file in SHIPPED]
    return [name_of(0, file) for file in (*SHIPPED, *REFERENCE_ONLY)] + [POST_CALIBRATION, *CONTROLS]


Writer = Callable[[Path], Any]


def table_writer(table: pd.DataFrame) -> Writer:
    """Return what writes a table as a Parquet file."""
    return lambda path: table.to_parquet(path, index=False)


def run_stage(
    store: ArtifactStore,
    seed: int,
    stage: str,
    code: tuple[str, ...],
    parameters: Mapping[str, Any],
    names: Sequence[str],
    make: Callable[[], Sequence[Writer]],
) -> None:
    """Unless all the named artifacts are there and current, make them: `make` returns what writes each."""
    made_by: dict[str, Any] = {"stage": stage, "code": code, "parameters": parameters, "seeds": (seed,)}
    if all(store.is_current(name, **made_by) for name in names):
        return
    start = time.process_time()
    writers = make()
    seconds = time.process_time() - start
    for name, write in zip(names, writers, strict=True):
        with store.write(name, **made_by, seconds=seconds) as path:
            write(path)


def _ppo(store: ArtifactStore, seed: int, recipe: Recipe, progress: bool) -> None:
    def make() -> list[Writer]:
        task = recipe.task
        envs = DynamicObstaclesVectorEnv(
            recipe.envs, task.size, task.n_obstacles, task.max_steps, task.random_start
        )
        recorder = RecordEpisodes(envs)
        result = ppo.train(recorder, recipe.ppo, seed, progress)
        flat = {f"{at}/{name}": t for at, state in result.checkpoints.items() for name, t in state.items()}
        history = recorder.trajectories()
        return [table_writer(result.diagnostics), history.save, lambda path: save_file(flat, path)]

    names = [name_of(seed, file) for file in ("ppo.parquet", "history.npz", "checkpoints.safetensors")]
    parameters = {"task": asdict(recipe.task), "ppo": asdict(recipe.ppo), "envs": recipe.envs}
    run_stage(
        store,
        seed,
        "ppo",
        (
            "dtbook.trajectories.ppo",
            "dtbook.trajectories.recording",
        ),
        parameters,
        names,
        make,
    )


def _collection(store: ArtifactStore, seed: int, recipe: Recipe, progress: bool) -> None:
    def make() -> list[Writer]:
        checkpoints: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(store.path(name_of(seed, "checkpoints.safetensors"))).items():
            at, name = key.split("/")
            checkpoints.setdefault(int(at), {})[name] = tensor
        ordered = dict(sorted(checkpoints.items()))
        collected = collect_by_quota(ordered, recipe.task, recipe.quota, seed, progress)
        return [table_writer(collected.log), collected.trajectories.save]

    names = [name_of(seed, file) for file in ("collection.parquet", "trajectories.npz")]
    parameters = {"task": asdict(recipe.task), "ppo": asdict(recipe.ppo), "quota": asdict(recipe.quota)}
    run_stage(store, seed, "collection", ("dtbook.trajectories.collection",), parameters, names, make)


def _training(store: ArtifactStore, seed: int, recipe: Recipe, progress: bool) -> None:
    folder = store.root / folder_of(seed) / ".training"  # where a killed run goes on; gone when it is done

    def make() -> list[Writer]:
        data = Trajectories.load(store.path(name_of(seed, "trajectories.npz")))
        result = training.train(data, recipe.model, recipe.train, seed, folder, progress, recipe.snapshots)
        half = {
            f"{step}/{name}": value.half()
            for step, weights in result.snapshots.items()
            for name, value in weights.items()
        }
        return [
            table_writer(result.curve),
            table_writer(result.evaluations),
            lambda path: save_file(half, path),
            result.model.save_pretrained,
        ]

    files = ("training.parquet", "evaluations.parquet", "snapshots.safetensors", "trained")
    names = [name_of(seed, file) for file in files]
    run_stage(store, seed, "training", ("dtbook.training",), _but_calibration(recipe), names, make)
    shutil.rmtree(folder, ignore_errors=True)


def _heads(store: ArtifactStore, seed: int, recipe: Recipe, progress: bool) -> None:
    def make() -> list[Writer]:
        trained = DecisionTransformer.from_pretrained(store.path(name_of(seed, "trained")))
        model, scores = _in_order(trained, recipe.task)
        return [table_writer(scores), model.save_pretrained]

    names = [name_of(seed, file) for file in ("heads.parquet", "model")]
    run_stage(
        store,
        seed,
        "heads",
        (
            "dtbook.training",
            "dtbook.analysis.heads",
        ),
        _but_calibration(recipe),
        names,
        make,
    )


def _in_order(model: DecisionTransformer, task: Task) -> tuple[DecisionTransformer, pd.DataFrame]:
    scores = heads.obstacle_head_scores(model, all_observations(task.size, task.n_obstacles))
    return heads.order_heads(model, scores), scores


def _but_calibration(recipe: Recipe) -> dict[str, Any]:
    return {name: value for name, value in asdict(recipe).items() if name != "calibration"}


def train_control(
    store: ArtifactStore, seed: int, recipe: Recipe | None = None, progress: bool = True
) -> None:
    """Train `CONTROLS[seed]` on the data set of seed 0, its actions permuted over all steps; heads ordered as ever.

    Untrained controls need no artifact: `DecisionTransformer(DTConfig(), seed)` is one.
    """
    recipe = recipe or Recipe()
    recipe = replace(recipe, train=replace(recipe.train, evaluation_episodes=0), snapshots=())
    folder = store.root / "controls" / f".training_{seed}"

    def make() -> list[Writer]:
        data = Trajectories.load(store.path(name_of(0, "trajectories.npz")))
        shuffled = replace(data, actions=np.random.default_rng(seed).permutation(data.actions))
        result = training.train(shuffled, recipe.model, recipe.train, seed, folder, progress)
        return [_in_order(result.model, recipe.task)[0].save_pretrained]

    code, parameters = ("dtbook.training", "dtbook.analysis.heads"), _but_calibration(recipe)
    with ppo.one_thread():
        run_stage(store, seed, "controls", code, parameters, [CONTROLS[seed]], make)
    shutil.rmtree(folder, ignore_errors=True)


def load_snapshots(store: ArtifactStore, seed: int = 0) -> dict[int, DecisionTransformer]:
    """Return training steps → the model as it was then (float16 on disk), heads numbered as the final model's."""
    final = DecisionTransformer.from_pretrained(store.path(name_of(seed, "model")))
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(store.path(name_of(seed, "snapshots.safetensors"))).items():
        at, name = key.split("/")
        weights.setdefault(int(at), {})[name] = tensor.float()
    models = {}
    for step, state in sorted(weights.items()):
        model = DecisionTransformer(final.cfg)
        model.load_state_dict(state)
        for layer, order in final.metadata["head_order"].items():
            model = model.permute_heads(int(layer), order)
        models[step] = model.eval()
    return models


def _calibration(store: ArtifactStore, seed: int, recipe: Recipe, progress: bool) -> None:
    def make() -> list[Writer]:
        model = DecisionTransformer.from_pretrained(store.path(name_of(seed, "model")))
        return [table_writer(calibrate(model, recipe.calibration, seed))]

    names = [name_of(seed, "calibration.parquet")]
    run_stage(store, seed, "calibration", ("dtbook.rollout",), asdict(recipe), names, make)
