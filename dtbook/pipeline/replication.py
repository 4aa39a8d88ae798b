"""From nothing to a replicated model: PPO, trajectories, Decision Transformer, calibration, stage by stage."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from dtbook import training
from dtbook.analysis import heads
from dtbook.artifacts.parameters import Checked, Count, Number, Whole, check, checked
from dtbook.artifacts.store import ArtifactStore
from dtbook.gridworld.env import DynamicObstaclesVectorEnv, all_observations
from dtbook.gridworld.rules import Task
from dtbook.model.config import DTConfig
from dtbook.model.transformer import DecisionTransformer
from dtbook.pipeline.engine import Job, Writer, table_row, table_writer
from dtbook.rollout import CALIBRATION_RTGS, calibration_curve, calibration_row
from dtbook.training import TrainConfig
from dtbook.trajectories import ppo
from dtbook.trajectories.collection import QuotaConfig, collect_by_quota
from dtbook.trajectories.episodes import Trajectories
from dtbook.trajectories.ppo import PPOConfig
from dtbook.trajectories.recording import RecordEpisodes

NOT_SHIPPED = ("checkpoints.safetensors", "snapshots.safetensors", "trained")
"""What `data/` holds of no replication: weights along the way are too large for git, `trained` has unordered heads."""
EPISODES = ("history.npz", "trajectories.npz")
"""What it holds of two replications alone: of the reference, and of the one that the recipe was tuned on."""
POST_RECIPE, FIRST_RECIPE = "recipe_post", "recipe_first"
"""The folders of what is made by the post's recipe, and by that of the book's first edition."""
TUNING, REFERENCE = 0, 10
"""The seed on whose data the book's recipe was tuned; and that of which chapters 2 to 9 tell."""
BOOK_SEEDS, FIRST_SEEDS = tuple(range(10, 20)), tuple(range(10))
"""The replications by the book's recipe that decide; and those of its first edition, on which it was tuned."""
CONTROLS = tuple(f"controls/shuffled_{seed}" for seed in range(3))
"""Models trained on the reference's data set with its actions shuffled, which say nothing about what to do."""
LONG_CONTEXT = "long_context/model"
"""A model of half the width of the book's that sees nine timesteps instead of one (chapter 8)."""
TABLE = "replicas.parquet"
"""How the replications did against `BARS`."""
BARS = {
    "greedy 0.9": (0.93, 1.0),
    "greedy -1": (-1.0, -0.95),
    "sampled 0": (-0.05, 0.05),
    "survived 0": (0.8, 1.0),
    "error": (0.0, 0.1),
}
"""Lowest and highest value of each measure of `TABLE` that a replication must keep to; for survival the bar of C03."""


@dataclass(frozen=True)
class LongContext(Checked):
    """How the model of nine timesteps is made."""

    model: DTConfig = DTConfig(d_model=64, d_head=32, d_mlp=128, n_timesteps=9)
    train: TrainConfig = TrainConfig(
        steps=4_000, batch_size=64, lr=1e-3, weight_decay=1e-4, evaluation_episodes=0
    )
    """A window has nine actions to predict, so that 64 have more of them than a batch of 384 single steps."""


def logarithmic(steps: int) -> tuple[int, ...]:
    """Return 42 training steps on a logarithmic grid, from the start, 0, to the end."""
    return (0, *np.unique(np.geomspace(20, steps, 41).round().astype(int)).tolist())


@dataclass(frozen=True)
class Recipe(Checked):
    """All settings of what is made, but the seeds."""

    folder: str = ""
    """Where its replications lie in a store: "" for those of the book, `seed_10` …"""
    task: Task = Task()
    ppo: PPOConfig = PPOConfig(
        checkpoint_every=1
    )  # survivors, which return 0, are there for a few updates only
    envs: Count = 64
    """Environments that PPO learns in at once."""
    episodes: Literal["quota", "history"] = "quota"
    """What is learnt from: episodes collected from PPO's checkpoints by `quota`, or all that PPO played on its way."""
    quota: QuotaConfig = QuotaConfig()
    model: DTConfig = DTConfig.book()
    train: TrainConfig = TrainConfig.book()
    snapshots: tuple[Whole, ...] = logarithmic(TrainConfig.book().steps)
    """Training steps after which the weights are kept."""
    calibration: Mapping[str, Any] = field(
        default_factory=lambda: {"rtgs": list(CALIBRATION_RTGS), "episodes": 500, "max_steps": 300}
    )
    long_context: LongContext = LongContext()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage → those of its settings that are others than in the table of stages."""

    @classmethod
    def post(cls) -> "Recipe":
        """Return the post's recipe, nothing tuned: the original's PPO and its history, start, drawing and optimiser."""
        return cls(
            POST_RECIPE,
            ppo=PPOConfig.post(),
            envs=30,
            episodes="history",
            model=DTConfig.post(),
            train=TrainConfig.post(),
            snapshots=logarithmic(TrainConfig.post().steps),
        )

    @classmethod
    def first(cls) -> "Recipe":
        """Return the recipe of the book's first edition, which changed more of the post's than behaviour needs."""
        return cls(FIRST_RECIPE, model=DTConfig(), train=TrainConfig(), snapshots=())

    @property
    def data(self) -> str:
        """Return the file that a transformer learns from."""
        return "history.npz" if self.episodes == "history" else "trajectories.npz"

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {"rtgs": Annotated[list[Number], Field(min_length=1)], "episodes": Count, "max_steps": Count}
        settings = {
            name: check(f"Recipe.calibration[{name!r}]", value, kinds.get(name, Any))
            for name, value in self.calibration.items()
        }
        object.__setattr__(self, "calibration", settings)


def folder_of(seed: int, recipe: Recipe | None = None) -> str:
    """Where a replication's artifacts lie in a store: `seed_10`, `seed_11` …, in the recipe's folder if it has one."""
    return "/".join([*filter(None, [recipe.folder if recipe else ""]), f"seed_{seed}"])


def name_of(seed: int, file: str) -> str:
    """The name of a replication's artifact in a store."""
    return f"{folder_of(seed)}/{file}"


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that "0-9" or "0,3,5-7" names, each once, in order; raise ValueError for anything else."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"seeds must be numbers and rising ranges like 0-9 or 0,3,5-7, not {text!r}")
        seeds |= dict.fromkeys(range(int(found[1]), int(found[2] or found[1]) + 1))
    return list(seeds)


def seeds_with(store: ArtifactStore, file: str, recipe: str = "") -> list[int]:
    """Return the replications, in a recipe's folder, of which a store has an artifact of that file name."""
    folder = f"{recipe}/" if recipe else ""
    matches = (re.fullmatch(rf"{folder}seed_(\d+)/{re.escape(file)}", name) for name in store.entries())
    return sorted(int(match[1]) for match in matches if match)


def is_shipped(name: str) -> bool:
    """Return whether an artifact is one that `data/` holds."""
    folder, _, file = name.rpartition("/")
    if folder.startswith(FIRST_RECIPE):
        return file == "claims.parquet"
    if folder.startswith(POST_RECIPE):
        return file not in (*NOT_SHIPPED, *EPISODES, "training.parquet")
    if folder == folder_of(TUNING):
        return file in (*EPISODES, "ppo.parquet", "collection.parquet")
    return file not in NOT_SHIPPED and (folder == folder_of(REFERENCE) or file not in EPISODES)


# ------------------------------------------------------------------------------------------- the stages' functions
@checked
def train_recorded(recipe: Recipe, seed: Whole, progress: bool = False) -> tuple[ppo.PPOResult, Trajectories]:
    """Train one PPO agent; return what came of it, and all that it played on its way."""
    recorder = RecordEpisodes(environments(recipe.task, recipe.envs))
    return ppo.train_ppo(recorder, recipe.ppo, seed, progress), recorder.trajectories()


@checked
def environments(task: Task, number: Count) -> DynamicObstaclesVectorEnv:
    """Return so many environments of a task."""
    return DynamicObstaclesVectorEnv(number, task.size, task.n_obstacles, task.max_steps, task.random_start)


def _ppo(job: Job) -> list[Writer]:
    result, history = train_recorded(job.recipe, job.seed, job.progress)
    flat = {f"{at}/{name}": t for at, state in result.checkpoints.items() for name, t in state.items()}
    return [table_writer(result.diagnostics), history.save, lambda path: save_file(flat, path)]


def _collection(job: Job) -> list[Writer]:
    checkpoints = _by_step(job.path("{of}/checkpoints.safetensors"))
    collected = collect_by_quota(checkpoints, job.recipe.task, job.recipe.quota, job.seed, job.progress)
    return [table_writer(collected.log), collected.trajectories.save]


def _training(job: Job) -> list[Writer]:
    recipe, data = job.recipe, Trajectories.load(job.path(*job.stage.needs))
    result = training.train(
        data, recipe.model, recipe.train, job.seed, job.resume, job.progress, recipe.snapshots
    )
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


def _heads(job: Job) -> list[Writer]:
    trained = DecisionTransformer.from_pretrained(job.path("{of}/trained"))
    model, scores = with_heads_in_order(trained, job.recipe.task)
    return [table_writer(scores), model.save_pretrained]


def with_heads_in_order(model: DecisionTransformer, task: Task) -> tuple[DecisionTransformer, pd.DataFrame]:
    """Return the model with its heads in order, and the scores of the heads that it came with."""
    scores = heads.obstacle_head_scores(model, all_observations(task.size, task.n_obstacles))
    return heads.order_heads(model, scores), scores


def calibrate(model: DecisionTransformer, settings: Mapping[str, Any], seed: int) -> pd.DataFrame:
    """Greedy and sampled calibration curves of one model, told apart by the column `acting`."""
    curves = [
        calibration_curve(model, greedy=acting == "greedy", seed=seed, **settings).assign(acting=acting)
        for acting in ("greedy", "sampled")
    ]
    return pd.concat(curves, ignore_index=True)


def calibration_of(recipe: Recipe, task: Task | None = None) -> dict[str, Any]:
    """Return the settings of `calibrate` in a recipe's task, or in another, as long as the calibration has it."""
    played = replace(task or recipe.task, max_steps=recipe.calibration["max_steps"])
    return {"task": played, **recipe.calibration}


def _calibration(job: Job) -> list[Writer]:
    return [table_writer(calibrate(job.subject().model, calibration_of(job.recipe), job.seed))]


def _control(job: Job) -> list[Writer]:
    """Train on the reference's data set, its actions permuted over all steps."""
    data = Trajectories.load(job.path(*job.stage.needs))
    shuffled = replace(data, actions=np.random.default_rng(job.seed).permutation(data.actions))
    config = replace(job.recipe.train, evaluation_episodes=0)
    result = training.train(shuffled, job.recipe.model, config, job.seed, job.resume, job.progress)
    return [with_heads_in_order(result.model, job.recipe.task)[0].save_pretrained]


def _long_context(job: Job) -> list[Writer]:
    data, how = Trajectories.load(job.path(_DATA)), job.recipe
    result = training.train(data, how.model, how.train, job.seed, job.resume, job.progress)
    return [result.model.save_pretrained]


def _summary(job: Job) -> list[Writer]:
    return [table_writer(summary(job.origin, job.seeds))]


def summary(store: ArtifactStore, seeds: Sequence[int]) -> pd.DataFrame:
    """Return one row a replication: what `BARS` bounds, the heads' obstacle scores, and which bars it missed.

    `greedy` and `sampled`: mean return when asked for −1, 0, 0.9; `survived 0`: share of sampled episodes still
    running at the end; `error`: mean absolute error of the sampled curve over RTG 0 … 0.9; `L0H1`: score of head 1.
    """
    rows = []
    for seed in seeds:
        row = bar_measures(pd.read_parquet(store.path(name_of(seed, "calibration.parquet"))))
        missed = [name for name, (low, high) in BARS.items() if not low <= row[name] <= high]
        model = DecisionTransformer.from_pretrained(store.path(name_of(seed, "model")))
        scores: dict[str, float] = model.metadata["obstacle_head"]["score"]
        rows.append({"seed": seed, **row, **scores, "meets": not missed, "missed": ", ".join(missed)})
    return pd.DataFrame(rows)


def bar_measures(curves: pd.DataFrame) -> dict[str, float]:
    """Return what `BARS` bounds, and the means beside it, of a model's two calibration curves."""
    measured = calibration_row(curves)
    means = [f"{acting} {rtg}" for acting in ("greedy", "sampled") for rtg in ("-1", "0", "0.9")]
    sampled = {name: measured[f"sampled {name}"] for name in ("survived 0", "error")}
    return {name: measured[name] for name in means} | sampled


# ------------------------------------------------------------------------------------------- the table, and its graph
_FROM_NOTHING = "{of}/ppo.parquet {of}/history.npz {of}/checkpoints.safetensors"
_TRAINED = "{of}/training.parquet {of}/evaluations.parquet {of}/snapshots.safetensors {of}/trained"
_DATA = f"{folder_of(REFERENCE)}/trajectories.npz"
REPLICATION_STAGES = (
    table_row("ppo", _ppo, _FROM_NOTHING, recipe="task ppo envs"),
    table_row(
        "collection",
        _collection,
        "{of}/collection.parquet {of}/trajectories.npz",
        "{of}/checkpoints.safetensors",
        recipe="task ppo quota",
    ),
    table_row("training", _training, _TRAINED, "{of}/trajectories.npz", recipe="model train snapshots"),
    table_row("heads", _heads, "{of}/heads.parquet {of}/model", "{of}/trained", recipe="task model train"),
    table_row(
        "calibration", _calibration, "{of}/calibration.parquet", "{of}/model", recipe="task calibration"
    ),
    table_row("controls", _control, "{of}", _DATA, recipe="task model train"),
    table_row("long context", _long_context, LONG_CONTEXT, _DATA, recipe="model train"),
    table_row("replicas", _summary, TABLE, "seed_{seed}/calibration.parquet seed_{seed}/model", recipe=""),
)
REPLICATION_ROWS = {stage.name: stage for stage in REPLICATION_STAGES}
REPLICATION = ("ppo", "collection", "training", "heads", "calibration")
"""The stages of one replication, in order."""


@checked
def replication(store: ArtifactStore, seed: Whole, recipe: Recipe, progress: bool = False) -> list[Job]:
    """Return the jobs of one replication, in order."""
    rows = [REPLICATION_ROWS[name] for name in REPLICATION]
    if recipe.episodes == "history":
        training = replace(REPLICATION_ROWS["training"], needs=(f"{{of}}/{recipe.data}",))
        rows = [training if row.name == "training" else row for row in rows if row.name != "collection"]
    of = folder_of(seed, recipe)
    return [Job(row, store, of, recipe, (seed,), progress=progress) for row in rows]


def around(store: ArtifactStore, recipe: Recipe) -> list[Job]:
    """Return the jobs that start from the reference's data set: the controls and the model of nine timesteps."""
    long_context = Job(REPLICATION_ROWS["long context"], store, recipe=recipe.long_context)
    return [*controls(store, REFERENCE, recipe), long_context]


def controls(store: ArtifactStore, reference: int, recipe: Recipe) -> list[Job]:
    """Return the jobs of the controls, which learn from a replication's data set with its actions shuffled."""
    stage = replace(REPLICATION_ROWS["controls"], needs=(f"{folder_of(reference, recipe)}/{recipe.data}",))
    names = controls_of(recipe)
    return [Job(stage, store, of, recipe, (seed,)) for seed, of in enumerate(names)]


def controls_of(recipe: Recipe) -> list[str]:
    """Return the names of a recipe's controls in a store."""
    return ["/".join(filter(None, [recipe.folder, name])) for name in CONTROLS]


@checked
def replicate(store: ArtifactStore, seed: Whole, recipe: Recipe | None = None, progress: bool = True) -> None:
    """Make every artifact of one replication, in this process, going on where an interrupted call stopped."""
    for job in replication(store, seed, recipe or Recipe(), progress):
        job.ensure()


@checked
def load_snapshots(
    store: ArtifactStore, seed: Whole = 0, recipe: Recipe | None = None
) -> dict[int, DecisionTransformer]:
    """Return training steps → the model as it was then (float16 on disk), heads numbered as the final model's."""
    of = folder_of(seed, recipe)
    final = DecisionTransformer.from_pretrained(store.path(f"{of}/model"))
    models = {}
    for step, state in _by_step(store.path(f"{of}/snapshots.safetensors")).items():
        model = DecisionTransformer(final.cfg)
        model.load_state_dict({name: value.float() for name, value in state.items()})
        for layer, order in final.metadata["head_order"].items():
            model = model.permute_heads(int(layer), order)
        models[step] = model.eval()
    return models


def _by_step(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Read the weights that a file holds as `step/name`, sorted by step."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        at, name = key.split("/")
        states.setdefault(int(at), {})[name] = tensor
    return dict(sorted(states.items()))
