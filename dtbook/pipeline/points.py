"""What a sweep can run besides notebooks: stages as functions of flat parameters, by their dotted names (`train.lr`).

Each is given its parameters, a folder to leave its artifacts in and a folder to keep what a killed run goes on from; it
returns one row of figures.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import save_file

from dtbook import training
from dtbook.artifacts.store import ArtifactStore, describe
from dtbook.gridworld.rules import Task
from dtbook.model.transformer import DecisionTransformer
from dtbook.pages.notebooks import Parameter, accept_all
from dtbook.pipeline import replication
from dtbook.pipeline.engine import Job, Stage, Writer
from dtbook.pipeline.replication import Recipe, calibrate, calibration_of, with_heads_in_order
from dtbook.rollout import calibration_row
from dtbook.trajectories import ppo
from dtbook.trajectories.episodes import Trajectories

_Row = dict[str, Any]
_Run = Callable[[Mapping[str, Any], Path, Path], _Row]


@dataclass(frozen=True)
class Kind:
    """What runs at a point, its parameters, and those of them that name an artifact."""

    run: _Run
    defaults: Mapping[str, Any]
    inputs: tuple[str, ...] = ()

    def check(self, name: str, given: Mapping[str, Any]) -> _Row:
        """Return `given` in the defaults' types; raise ValueError, one sentence, for a name or value that is wrong."""
        declared = {each: Parameter(each, default, "") for each, default in self.defaults.items()}
        checked = accept_all(name, declared, given)
        recipe_of({**self.defaults, **checked})
        self.digests(checked)
        return checked

    def digests(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the sha256 of the artifacts that the parameters name."""
        whole, entries = {**self.defaults, **given}, ArtifactStore().entries()
        named = {name: whole[name] for name in self.inputs}
        return {
            name: (entries[at] if at in entries else describe(locate(at)))["sha256"]
            for name, at in named.items()
        }

    def stage(self, name: str) -> Stage:
        """Return the row of the table of stages that runs a point."""
        return Stage(name, ("points/{of}",), partial(run_kind, self.run, self.defaults))


def run_kind(run: _Run, defaults: Mapping[str, Any], job: Job) -> list[Writer]:
    """Run a point: its artifact is a folder, in which `row.json` has the figures."""
    folder = job.resume / "made"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = run({**defaults, **job.given}, folder, job.resume / "run")
    (folder / "row.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return [lambda path: shutil.copytree(folder, path)]


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


def flat_defaults(*parts: str) -> _Row:
    """Return the recipe's settings by dotted name, those of the given parts: {"train.lr": 0.0008, …}.

    A part that is one setting goes by its name alone.
    """
    settings, flat = asdict(Recipe()), {}
    for part in parts:
        if not isinstance(settings[part], Mapping):
            flat[part] = settings[part]
            continue
        for name, value in settings[part].items():
            flat[f"{part}.{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def recipe_of(parameters: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the settings that have these dotted names; others are left alone."""
    recipe = Recipe(**{name: parameters[name] for name in ("envs", "episodes") if name in parameters})
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


# ------------------------------------------------------------------------------------------------- what is run
def run_training(parameters: Mapping[str, Any], folder: Path, resume: Path) -> _Row:
    """Train one transformer on the trajectories that `data` names, score its heads and calibrate it."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    data = Trajectories.load(locate(parameters["data"]))
    result = training.train(data, recipe.model, recipe.train, seed, resume, progress=False)
    model, row = result.model, {"loss": result.curve["loss"].tail(100).mean()}
    if parameters["head_scores"] and recipe.model.n_layers:
        model, scores = with_heads_in_order(model, data.task)
        scores.to_parquet(folder / "heads.parquet", index=False)
        named = model.metadata["obstacle_head"]
        row |= {"obstacle_head": named["head"], "whole_change": named["whole_change"]}
        row |= {f"score {head}": score for head, score in named["score"].items()}
    model.save_pretrained(folder / "model")
    result.curve.to_parquet(folder / "training.parquet", index=False)
    result.evaluations.to_parquet(folder / "evaluations.parquet", index=False)
    row["weights"] = sum(weight.numel() for weight in model.parameters())
    return row | _calibrate(model, recipe, data.task, seed, folder)


def run_calibration(parameters: Mapping[str, Any], folder: Path, resume: Path) -> _Row:
    """Calibrate the model folder that `weights` names."""
    model = DecisionTransformer.from_pretrained(locate(parameters["weights"]))
    recipe = recipe_of(parameters)
    return _calibrate(model, recipe, recipe.task, parameters["seed"], folder)


def _calibrate(model: DecisionTransformer, recipe: Recipe, task: Task, seed: int, folder: Path) -> _Row:
    curves = calibrate(model, calibration_of(recipe, task), seed)
    curves.to_parquet(folder / "calibration.parquet", index=False)
    return calibration_row(curves)


def run_ppo(parameters: Mapping[str, Any], folder: Path, resume: Path) -> _Row:
    """Train one PPO agent; its greedy return in 500 episodes says what it has learnt."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    result, history = replication.train_recorded(recipe, seed)
    history.save(folder / "history.npz")
    result.diagnostics.to_parquet(folder / "ppo.parquet", index=False)
    save_file(result.agent.state_dict(), folder / "agent.safetensors")
    envs = replication.environments(recipe.task, 500)
    returns = ppo.evaluate_agent(result.agent, envs, 500, greedy=True, seed=seed)["return"]
    shares = np.bincount(history.classes, minlength=3) / len(history.classes)
    row = {"greedy": float(returns.mean()), "episodes": len(history.lengths)}
    return row | {f"share {name}": float(share) for name, share in zip("-0+", shares, strict=True)}


def run_replication(parameters: Mapping[str, Any], folder: Path, resume: Path) -> _Row:
    """Everything from nothing: PPO, collection, training, calibration and the head scores."""
    recipe, seed = recipe_of(parameters), parameters["seed"]
    made, kept = ArtifactStore(resume), ArtifactStore(folder)
    for job in replication.replication(made, seed, recipe):
        job.ensure()
    for name in made.entries():
        if name.rpartition("/")[2] not in (*replication.NOT_SHIPPED, *replication.EPISODES):
            kept.take(name, made)
    at = kept.root / replication.folder_of(seed)
    scores = pd.read_parquet(at / "heads.parquet").to_dict("records")
    row = {f"score L{score['layer']}H{score['head']}": float(score["score"]) for score in scores}
    return row | calibration_row(pd.read_parquet(at / "calibration.parquet"))


_REFERENCE = replication.folder_of(replication.REFERENCE)
POINT_KINDS = {
    "training": Kind(
        run_training,
        {
            "seed": 0,
            "data": f"{_REFERENCE}/trajectories.npz",
            "head_scores": True,
            **flat_defaults("model", "train", "calibration"),
        },
        ("data",),
    ),
    "calibration": Kind(
        run_calibration,
        {"weights": f"{_REFERENCE}/model", "seed": 0, **flat_defaults("task", "calibration")},
        ("weights",),
    ),
    "ppo": Kind(run_ppo, {"seed": 0, **flat_defaults("task", "ppo", "envs")}),
    "replication": Kind(
        run_replication,
        {
            "seed": 0,
            **flat_defaults("task", "ppo", "envs", "episodes", "quota", "model", "train", "calibration"),
        },
    ),
}
"""What a sweep can run, by name."""
