"""Single stages of the pipeline as functions of flat parameters, for sweeps: training, calibration, ppo, replication.

A stage is given parameters by their dotted names (`train.lr`, `model.n_layers`), a folder to leave its artifacts
in and a folder to keep what a killed run goes on from; it returns one row of figures.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import save_file

from dtbook import pipeline, training
from dtbook.analysis import heads
from dtbook.artifacts.store import ArtifactStore, describe
from dtbook.gridworld.env import DynamicObstaclesVectorEnv, all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.transformer import DecisionTransformer
from dtbook.pages.notebooks import Parameter
from dtbook.pipeline import Recipe
from dtbook.rollout import calibration_error
from dtbook.trajectories import ppo
from dtbook.trajectories.recording import RecordEpisodes, Trajectories

Row = dict[str, Any]
Run = Callable[[Mapping[str, Any], Path, Path], Row]


@dataclass(frozen=True)
class Stage:
    """A stage: the rooms that do it, its parameters and those of them that name an artifact, and how it is run."""

    code: tuple[str, ...]
    defaults: Mapping[str, Any]
    inputs: tuple[str, ...]
    run: Run

    def check(self, given: Mapping[str, Any]) -> Row:
        """Return `given` in the defaults' types; raise ValueError, one sentence, for a name or value that is wrong."""
        unknown = [name for name in given if name not in self.defaults]
        if unknown:
            raise ValueError(f"there is no parameter {unknown[0]!r}: there are {', '.join(self.defaults)}")
        checked = {
            name: Parameter(name, self.defaults[name], "").accept(value) for name, value in given.items()
        }
        whole = {**self.defaults, **checked}
        recipe_of(whole)
        for name in self.inputs:
            locate(whole[name])
        return checked

    def digests(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the sha256 of the artifacts that the parameters name."""
        whole = {**self.defaults, **given}
        named = {name: whole[name] for name in self.inputs}
        entries = ArtifactStore().entries()
        return {
            name: (entries[at] if at in entries else describe(locate(at)))["sha256"]
            for name, at in named.items()
        }


def locate(artifact: str) -> Path:
    """Return the path of an artifact of `data/` by its name, or of a file or folder of one's own by its path.

    Raises ValueError for one that is neither; a path must be absolute, since workers run anywhere.
    """
    store = ArtifactStore()
    if artifact in store.entries():
        return store.path(artifact)
    if not (Path(artifact).is_absolute() and Path(artifact).exists()):
        raise ValueError(
            f"there is no artifact {artifact!r}: give an absolute path that exists, or a name in {store.manifest}"
        )
    return Path(artifact)


def flat_defaults(*parts: str) -> Row:
    """Return the recipe's settings by dotted name, those of the given parts: {"train.lr": 0.0008, …}."""
    settings = asdict(Recipe())
    flat = {
        f"{part}.{name}": list(value) if isinstance(value, tuple) else value
        for part in parts
        for name, value in settings[part].items()
    }
    return flat | ({"envs": settings["envs"]} if "ppo" in parts else {})


def recipe_of(parameters: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the settings that have these dotted names; others are left alone."""
    recipe = Recipe(**({"envs": parameters["envs"]} if "envs" in parameters else {}))
    for part in ("task", "ppo", "quota", "model", "train", "calibration"):
        chosen = {
            name.removeprefix(f"{part}."): value
            for name, value in parameters.items()
            if name.startswith(f"{part}.")
        }
        before = getattr(recipe, part)
        if part == "calibration":
            after: Any = dict(before) | chosen
        else:  # lists of the sweep's file are tuples in the configurations
            after = replace(before, **{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
        recipe = replace(recipe, **{part: after})
    return recipe


# ------------------------------------------------------------------------------------------------- stages
def run_training(parameters: Mapping[str, Any], folder: Path, resume: Path) -> Row:
    """Train one transformer on the trajectories that `data` names, score its heads and calibrate it."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    data = Trajectories.load(locate(parameters["data"]))
    result = training.train(data, recipe.model, recipe.train, seed, resume, progress=False)
    model, row = result.model, {"loss": result.curve["loss"].tail(100).mean()}
    if parameters["head_scores"] and recipe.model.n_layers:
        scores = heads.obstacle_head_scores(model, all_observations(data.task.size, data.task.n_obstacles))
        model = heads.order_heads(model, scores)
        scores.to_parquet(folder / "heads.parquet", index=False)
        named = model.metadata["obstacle_head"]
        row |= {"obstacle_head": named["head"], "whole_change": named["whole_change"]}
        row |= {f"score {head}": score for head, score in named["score"].items()}
    model.save_pretrained(folder / "model")
    result.curve.to_parquet(folder / "training.parquet", index=False)
    result.evaluations.to_parquet(folder / "evaluations.parquet", index=False)
    row["weights"] = sum(weight.numel() for weight in model.parameters())
    return row | _calibrate(model, recipe, data.task, seed, folder)


def run_calibration(parameters: Mapping[str, Any], folder: Path, resume: Path) -> Row:
    """Calibrate the model folder that `weights` names."""
    model = DecisionTransformer.from_pretrained(locate(parameters["weights"]))
    recipe = recipe_of(parameters)
    return _calibrate(model, recipe, recipe.task, parameters["seed"], folder)


def run_ppo(parameters: Mapping[str, Any], folder: Path, resume: Path) -> Row:
    """Train one PPO agent; its greedy return in 500 episodes says what it has learnt."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    task = recipe.task

    def envs(number: int) -> DynamicObstaclesVectorEnv:
        return DynamicObstaclesVectorEnv(
            number, task.size, task.n_obstacles, task.max_steps, task.random_start
        )

    recorder = RecordEpisodes(envs(recipe.envs))
    result = ppo.train(recorder, recipe.ppo, seed, progress=False)
    history = recorder.trajectories()
    history.save(folder / "history.npz")
    result.diagnostics.to_parquet(folder / "ppo.parquet", index=False)
    save_file(result.agent.state_dict(), folder / "agent.safetensors")
    returns = ppo.evaluate(result.agent, envs(500), 500, greedy=True, seed=seed)["return"]
    shares = np.bincount(history.classes, minlength=3) / len(history.classes)
    row = {"greedy": float(returns.mean()), "episodes": len(history.lengths)}
    return row | {f"share {name}": float(share) for name, share in zip("-0+", shares, strict=True)}


def run_replication(parameters: Mapping[str, Any], folder: Path, resume: Path) -> Row:
    """Everything from nothing: PPO, collection, training, calibration, and the head scores."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    made = ArtifactStore(resume)
    pipeline.replicate(made, seed, recipe, progress=False)
    for name in pipeline.SHIPPED:
        ArtifactStore(folder).take(pipeline.name_of(seed, name), made)
    at = ArtifactStore(folder).root / pipeline.folder_of(seed)
    scores = pd.read_parquet(at / "heads.parquet").to_dict("records")
    row = {f"score L{score['layer']}H{score['head']}": float(score["score"]) for score in scores}
    return row | _summary(pd.read_parquet(at / "calibration.parquet"))


def _calibrate(model: DecisionTransformer, recipe: Recipe, task: Task, seed: int, folder: Path) -> Row:
    task = replace(task, max_steps=recipe.calibration["max_steps"])
    curves = pipeline.calibrate(model, {**recipe.calibration, "task": task}, seed)
    curves.to_parquet(folder / "calibration.parquet", index=False)
    return _summary(curves)


def _summary(curves: pd.DataFrame) -> Row:
    """The mean return at each RTG asked for by the claims, the survival at 0, the error over 0 … 0.9; two ways."""
    row: Row = {}
    for acting, curve in curves.groupby("acting"):
        at = curve.set_index(curve["rtg"].round(3))
        row |= {f"{acting} {rtg:g}": float(at["mean"][rtg]) for rtg in (-1.0, 0.0, 0.9) if rtg in at.index}
        if 0.0 in at.index:
            row[f"{acting} survived 0"] = float(at["survived"][0.0])
        if curve["rtg"].between(0, 0.9).any():
            row[f"{acting} error"] = calibration_error(curve)
    return row


_CALIBRATION = {"seed": 0, **flat_defaults("task", "calibration")}
STAGES = {
    "training": Stage(
        ("dtbook.analysis.heads", "dtbook.rollout", "dtbook.training"),
        {
            "seed": 0,
            "data": "seed_0/trajectories.npz",
            "head_scores": True,
            **flat_defaults("model", "train", "calibration"),
        },
        ("data",),
        run_training,
    ),
    "calibration": Stage(
        ("dtbook.rollout",), {"weights": "seed_0/model", **_CALIBRATION}, ("weights",), run_calibration
    ),
    "ppo": Stage(
        ("dtbook.trajectories.ppo", "dtbook.trajectories.recording"),
        {"seed": 0, **flat_defaults("task", "ppo")},
        (),
        run_ppo,
    ),
    "replication": Stage(
        ("dtbook.pipeline",),
        {"seed": 0, **flat_defaults("task", "ppo", "quota", "model", "train", "calibration")},
        (),
        run_replication,
    ),
}
"""The stages that a sweep can run, by name."""
