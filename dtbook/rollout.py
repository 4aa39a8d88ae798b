"""Acting in the task: a Decision Transformer given an RTG, all episodes of all RTGs in lockstep."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float, Int64, UInt8
from tqdm import tqdm

from dtbook.artifacts.parameters import Count, Whole, cast, check_finite, checked, require
from dtbook.gridworld.env import DynamicObstaclesVectorEnv
from dtbook.gridworld.kernels import VIEW_SIZE, WALL
from dtbook.gridworld.rules import ACTIONS, FRONT, Task
from dtbook.model.config import DTConfig
from dtbook.model.transformer import DecisionTransformer
from dtbook.trajectories.anytask import Envs, check_envs, check_rewards, first_images
from dtbook.trajectories.episodes import Trajectories
from dtbook.trajectories.recording import play

CALIBRATION_RTGS = tuple(round(float(rtg), 1) for rtg in np.linspace(-1, 1, 21))
"""The RTGs of the post's Fig. 5: −1 to 1 in steps of 0.1."""

OUTCOMES = ("goal", "truncated", "obstacle", "wall")


class ModelPolicy:
    """Acts as the model does when each episode has an RTG of its own.

    Called as `policy(images, episodes, timesteps) -> actions`; keeps the last `cfg.n_timesteps` observations and
    actions of every episode, so any context length works. `greedy` takes the likeliest action, else it samples.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        rtgs: Float[np.ndarray, " episodes"],
        greedy: bool,
        rng: np.random.Generator,
    ) -> None:
        check_finite("model", dict(model.named_parameters()))
        context, view = model.cfg.n_timesteps, model.cfg.view_size
        self.model, self.greedy, self.rng = model, greedy, rng
        self.rtgs = torch.as_tensor(rtgs, dtype=torch.float32)
        self.images = np.zeros((len(rtgs), context, view, view, 3), dtype=np.uint8)
        self.actions = np.zeros((len(rtgs), context), dtype=np.int64)

    def __call__(
        self,
        images: UInt8[np.ndarray, "active view view 3"],
        episodes: Int64[np.ndarray, " active"],
        timesteps: Int64[np.ndarray, " active"],
    ) -> Int64[np.ndarray, " active"]:
        """Return the actions of the running episodes, after remembering what they see and do."""
        context, most = self.images.shape[1], self.model.cfg.max_steps
        require(
            timesteps.max() <= most,
            "the timestep of an episode",
            timesteps.max(),
            f"at most the model's, {most}",
        )
        last = np.minimum(timesteps, context - 1)
        full = episodes[timesteps >= context]
        self.images[full, :-1] = self.images[full, 1:]
        self.actions[full, :-1] = self.actions[full, 1:]
        self.images[episodes, last] = images
        actions = self._choose(self._logits(episodes, timesteps - last, last))
        self.actions[episodes, last] = actions
        return actions

    @torch.inference_mode()
    def _logits(self, episodes: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        # shorter rows are padded on the right, which attention never sees
        width = int(last.max()) + 1
        timesteps = np.minimum(first[:, None] + np.arange(width), self.model.cfg.max_steps)
        logits = self.model.fast_forward(
            torch.from_numpy(self.images[episodes, :width]),
            self.rtgs[episodes, None].expand(-1, width),
            torch.from_numpy(timesteps),
            torch.from_numpy(self.actions[episodes, : width - 1]),
        )
        return logits[torch.arange(len(episodes)), torch.from_numpy(last)].double().numpy()

    def _choose(self, logits: np.ndarray) -> np.ndarray:
        if np.isnan(logits).any():
            raise ValueError("a logit of model is nan; whatever it is given, each must be a number.")
        if not self.greedy:
            # the argmax of logits + Gumbel noise is a sample of their softmax
            logits = logits + self.rng.gumbel(size=logits.shape)
        return logits.argmax(1)


@checked
def rollout(
    model: DecisionTransformer,
    rtgs: npt.ArrayLike,
    greedy: bool = False,
    max_steps: Count = 300,
    seed: Whole = 0,
    task: Task | None = None,
) -> Trajectories:
    """Play one episode for each entry of `rtgs` and return the episodes, in that order.

    `task` says where (default: the 8×8 task truncated after `max_steps`, which `task` overrides). Raises
    ValueError for an RTG that is not a finite number, for a model that has diverged, and where `check_task` does.
    """
    targets, task = _check_rtgs(rtgs), task or Task(max_steps=max_steps)
    check_task(task, model.cfg)
    rng = np.random.default_rng(seed)
    policy = ModelPolicy(model, targets, greedy, rng)
    return play(task, policy, len(targets), rng)


@checked
def rollout_in(
    envs: Envs,
    model: DecisionTransformer,
    rtgs: npt.ArrayLike,
    greedy: bool = False,
    seed: Whole = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Play one episode for each entry of `rtgs` in any Gymnasium vector environment; one row an episode.

    The sub-environments take the next episode from the queue when they have finished one. Columns: `rtg`,
    `return`, `length`, `truncated`. Raises ValueError, before any step, for environments that
    `anytask.check_envs` refuses and for a model that they do not fit; where they do not say how long an episode
    may last, one that outlasts the model's time embedding is refused there.
    """
    targets = _check_rtgs(rtgs)
    _check_fit(model.cfg, *check_envs(envs), _step_limit(envs))
    policy = ModelPolicy(model, targets, greedy, np.random.default_rng(seed))
    rows = np.zeros((len(targets), 3))  # return, length, truncated
    queue = iter(range(envs.num_envs, len(targets)))
    lane = np.arange(envs.num_envs)
    lane = np.where(lane < len(targets), lane, -1)  # −1: nothing left to play
    images = first_images(envs, seed)
    actions = np.zeros(envs.num_envs, dtype=np.int64)
    with tqdm(total=len(targets), desc="episodes", disable=not progress) as bar:
        while (busy := np.flatnonzero(lane >= 0)).size:
            episodes = lane[busy]
            actions[busy] = policy(images[busy], episodes, rows[episodes, 1].astype(np.int64))
            images, rewards, terminated, truncated, _ = envs.step(actions)
            check_rewards(rewards)
            rows[episodes, 0] += rewards[busy]
            rows[episodes, 1] += 1
            rows[episodes, 2] = truncated[busy] & ~terminated[busy]
            done = busy[(terminated | truncated)[busy]]
            lane[done] = [next(queue, -1) for _ in done]
            bar.update(len(done))
    frame = pd.DataFrame({"rtg": targets, "return": rows[:, 0], "length": rows[:, 1].astype(np.int64)})
    return frame.assign(truncated=rows[:, 2].astype(bool))


def outcomes(trajectories: Trajectories) -> np.ndarray:
    """Return how each episode ended, one of `OUTCOMES`: at the goal, truncated, on an obstacle or on a wall."""
    last = trajectories.episode_starts + trajectories.lengths - 1
    into_wall = trajectories.observations(last)[:, *FRONT, 0] == WALL
    conditions = [trajectories.returns > 0, trajectories.truncated, ~into_wall]
    return np.select(conditions, OUTCOMES[:3], default="wall")


def episode_table(trajectories: Trajectories, rtgs: Float[np.ndarray, " episodes"]) -> pd.DataFrame:
    """Return one row an episode: `rtg`, `return`, `length`, `truncated`, `outcome`."""
    return pd.DataFrame(
        {
            "rtg": np.asarray(rtgs, dtype=np.float64),
            "return": trajectories.returns.astype(np.float64),
            "length": trajectories.lengths,
            "truncated": trajectories.truncated,
            "outcome": outcomes(trajectories),
        }
    )


@checked
def calibration_curve(
    model: DecisionTransformer,
    rtgs: npt.ArrayLike = CALIBRATION_RTGS,
    episodes: Count = 500,
    greedy: bool = False,
    max_steps: Count = 300,
    seed: Whole = 0,
    task: Task | None = None,
) -> pd.DataFrame:
    """Return what the model achieves for each RTG it is given (the post's Fig. 5), one row an RTG.

    Columns as in `summarise`. All `len(rtgs)` × `episodes` episodes are played in lockstep.
    """
    targets = np.repeat(_check_rtgs(rtgs), episodes)
    return summarise(episode_table(rollout(model, targets, greedy, max_steps, seed, task), targets))


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each RTG of an episode table.

    Columns: `mean` return with its standard error `sem`, the band that holds 95 % of the returns (`low`, `high`),
    mean `length`, the shares `succeeded`, `survived` and `died`, and `episodes`.
    """
    grouped = table.groupby("rtg")["return"]
    frame = pd.DataFrame(
        {
            "mean": grouped.mean(),
            "sem": grouped.sem(ddof=1).fillna(0.0),
            "low": grouped.quantile(0.025),
            "high": grouped.quantile(0.975),
            "length": table.groupby("rtg")["length"].mean(),
            "succeeded": (table["return"] > 0).groupby(table["rtg"]).mean(),
            "survived": table.groupby("rtg")["truncated"].mean(),
            "died": (table["return"] < 0).groupby(table["rtg"]).mean(),
            "episodes": grouped.size(),
        }
    )
    return frame.reset_index()


def calibration_error(curve: pd.DataFrame, low: float = 0.0, high: float = 0.9) -> float:
    """Return the mean absolute difference between mean return and RTG over the RTGs from `low` to `high`."""
    within = curve[(curve["rtg"] >= low - 1e-9) & (curve["rtg"] <= high + 1e-9)]
    if within.empty:
        raise ValueError(f"the curve has no RTG between {low} and {high}")
    return float((within["mean"] - within["rtg"]).abs().mean())


def calibration_row(
    calibration: pd.DataFrame,
    columns: Mapping[str, Sequence[float]] = MappingProxyType({"mean": (-1.0, 0.0, 0.9), "survived": (0.0,)}),
) -> dict[str, float]:
    """Return figures of a table of calibration curves by name, each way of acting for itself.

    "greedy 0.9" is the mean return, "sampled survived 0" that column, at the RTG at the end of the name; with the means
    goes "greedy error", `calibration_error`. RTGs that a curve does not have are left out.
    """
    row: dict[str, float] = {}
    for acting, curve in calibration.groupby("acting"):
        at = curve.set_index(curve["rtg"].round(3))
        for column, rtgs in columns.items():
            name = f"{acting} " if column == "mean" else f"{acting} {column} "
            row |= {f"{name}{rtg:g}": float(at[column][rtg]) for rtg in rtgs if rtg in at.index}
        if "mean" in columns and curve["rtg"].between(0, 0.9).any():
            row[f"{acting} error"] = calibration_error(curve)
    return row


def _check_rtgs(rtgs: npt.ArrayLike) -> np.ndarray:
    try:
        targets = np.atleast_1d(np.asarray(rtgs, dtype=np.float64))
        cast("rtgs", targets, np.float32)  # as the model is given them
    except (TypeError, ValueError):
        raise ValueError(f"rtgs must be finite numbers, not {rtgs!r}") from None
    if targets.ndim != 1 or not len(targets):
        raise ValueError(f"rtgs must be a non-empty list of finite numbers, not {rtgs!r}")
    return targets


def check_task(task: Task, cfg: DTConfig) -> None:
    """Raise ValueError where a model of this shape cannot play a task: its actions, its view or its steps."""
    _check_fit(cfg, len(ACTIONS), VIEW_SIZE, task.max_steps)


def _check_fit(cfg: DTConfig, n_actions: int, view_size: int, max_steps: int) -> None:
    require(
        cfg.n_actions <= n_actions, "the model's n_actions", cfg.n_actions, f"at most the task's, {n_actions}"
    )
    require(cfg.view_size == view_size, "the model's view_size", cfg.view_size, f"the task's, {view_size}")
    most = f"at most the model's, {cfg.max_steps}, the last timestep that it embeds"
    require(max_steps <= cfg.max_steps, "the task's max_steps", max_steps, most)


def _step_limit(envs: Envs) -> int:
    """Return the steps after which all sub-environments truncate, where they are here to say it; else 0."""
    if isinstance(envs.unwrapped, DynamicObstaclesVectorEnv):
        return envs.unwrapped.task.max_steps
    return max((_steps_of(env) for env in getattr(envs.unwrapped, "envs", [])), default=0)


def _steps_of(env: gym.Env[Any, Any]) -> int:
    own = getattr(env.unwrapped, "max_steps", None)  # minigrid's
    limits = [own, env.spec and env.spec.max_episode_steps]
    return min((limit for limit in limits if limit), default=0)
