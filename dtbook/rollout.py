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

from dtbook.gridworld.kernels import WALL
from dtbook.gridworld.rules import FRONT, Task
from dtbook.model.transformer import DecisionTransformer
from dtbook.trajectories.ppo import check_envs
from dtbook.trajectories.recording import Trajectories, play

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
        context = model.cfg.n_timesteps
        self.model, self.greedy, self.rng = model, greedy, rng
        self.rtgs = torch.as_tensor(rtgs, dtype=torch.float32)
        self.images = np.zeros((len(rtgs), context, 7, 7, 3), dtype=np.uint8)
        self.actions = np.zeros((len(rtgs), context), dtype=np.int64)

    def __call__(
        self,
        images: UInt8[np.ndarray, "active 7 7 3"],
        episodes: Int64[np.ndarray, " active"],
        timesteps: Int64[np.ndarray, " active"],
    ) -> Int64[np.ndarray, " active"]:
        """Return the actions of the running episodes, after remembering what they see and do."""
        context = self.images.shape[1]
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
        if not self.greedy:
            # the argmax of logits + Gumbel noise is a sample of their softmax
            logits = logits + self.rng.gumbel(size=logits.shape)
        return logits.argmax(1)


def rollout(
    model: DecisionTransformer,
    rtgs: npt.ArrayLike,
    greedy: bool = False,
    max_steps: int = 300,
    seed: int = 0,
    task: Task | None = None,
) -> Trajectories:
    """Play one episode for each entry of `rtgs` and return the episodes, in that order.

    `task` says where (default: the 8×8 task truncated after `max_steps`, which `task` overrides). Raises
    ValueError for an RTG that is not a finite number, or where the task outlasts the model's time embedding.
    """
    targets = _check_rtgs(rtgs)
    task = _check_task(task or Task(max_steps=max_steps), model)
    rng = np.random.default_rng(seed)
    policy = ModelPolicy(model, targets, greedy, rng)
    return play(task, policy, len(targets), rng)


def rollout_in(
    envs: gym.vector.VectorEnv[Any, Any, Any],
    model: DecisionTransformer,
    rtgs: npt.ArrayLike,
    greedy: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Play one episode for each entry of `rtgs` in any Gymnasium vector environment; one row an episode.

    The sub-environments (same-step autoreset, image observations) take the next episode from the queue when they
    have finished one. Columns: `rtg`, `return`, `length`, `truncated`.
    """
    targets = _check_rtgs(rtgs)
    check_envs(envs)
    policy = ModelPolicy(model, targets, greedy, np.random.default_rng(seed))
    rows = np.zeros((len(targets), 3))  # return, length, truncated
    queue = iter(range(envs.num_envs, len(targets)))
    lane = np.arange(envs.num_envs)
    lane = np.where(lane < len(targets), lane, -1)  # −1: nothing left to play
    images, _ = envs.reset(seed=seed)
    actions = np.zeros(envs.num_envs, dtype=np.int64)
    with tqdm(total=len(targets), desc="episodes", disable=not progress) as bar:
        while (busy := np.flatnonzero(lane >= 0)).size:
            episodes = lane[busy]
            actions[busy] = policy(images[busy], episodes, rows[episodes, 1].astype(np.int64))
            images, rewards, terminated, truncated, _ = envs.step(actions)
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


def calibration_curve(
    model: DecisionTransformer,
    rtgs: npt.ArrayLike = CALIBRATION_RTGS,
    episodes: int = 500,
    greedy: bool = False,
    max_steps: int = 300,
    seed: int = 0,
    task: Task | None = None,
) -> pd.DataFrame:
    """Return what the model achieves for each RTG it is given (the post's Fig. 5), one row an RTG.

    Columns as in `summarise`. All `len(rtgs)` × `episodes` episodes are played in lockstep.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, not {episodes}")
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
    except (TypeError, ValueError):
        raise ValueError(f"rtgs must be finite numbers, not {rtgs!r}") from None
    if targets.ndim != 1 or not len(targets) or not np.isfinite(targets).all():
        raise ValueError(f"rtgs must be a non-empty list of finite numbers, not {rtgs!r}")
    return targets


def _check_task(task: Task, model: DecisionTransformer) -> Task:
    if task.max_steps > model.cfg.max_steps:
        raise ValueError(
            f"max_steps must be at most {model.cfg.max_steps}, the last timestep that this model embeds, "
            f"not {task.max_steps}"
        )
    return task
