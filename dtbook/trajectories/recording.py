"""Recording episodes: playing them in lockstep, and keeping PPO's own history."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float32, Int

from dtbook import gridworld
from dtbook.artifacts.parameters import Count, cast, checked
from dtbook.gridworld.rules import GridState, Task
from dtbook.trajectories.episodes import STEP_COLUMNS, Trajectories

Policy = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""`policy(images, episodes, timesteps) -> actions`, each with a row for every episode that is still running:
what it sees (uint8, 7 × 7 × 3), which episode it is, and the timestep it has reached."""


@checked
def play(
    task: Task,
    policy: Policy,
    episodes: Count,
    rng: np.random.Generator,
    checkpoint: Int[np.ndarray, " episodes"] | int = -1,
    temperature: Float32[np.ndarray, " episodes"] | float = 1.0,
) -> Trajectories:
    """Play whole episodes in lockstep, one timestep of all of them at a time, and return them.

    Those that have ended leave the batch, so a step costs only what is still running.
    """
    state, active = gridworld.reset(task, episodes, rng), np.arange(episodes)
    recorder = _Recorder(task)
    for timestep in range(task.max_steps):
        images = gridworld.observe(state, task.size)
        actions = cast("actions", policy(images, active, np.full(len(active), timestep)), np.uint8)
        after = gridworld.step(task, state, actions, rng)
        recorder.add(active, state, actions, after.reward, after.truncated & ~after.terminated, after.state)
        going = ~(after.terminated | after.truncated)
        active, state = active[going], GridState(*(column[going] for column in after.state))
        if not len(active):
            break
    return recorder.trajectories(checkpoint, temperature)


class _Recorder:
    """Steps of many episodes, as they come in from the lockstep, packed episode after episode at the end.

    Rows of episode −1 belong to none and are left out.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.episode: list[np.ndarray] = []
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in (*STEP_COLUMNS, "truncated")}
        self.after: dict[str, list[np.ndarray]] = {name: [] for name in GridState._fields[:3]}

    def add(
        self,
        episode: np.ndarray,
        before: GridState,
        actions: np.ndarray,
        rewards: np.ndarray,
        truncated: np.ndarray,
        after: GridState,
    ) -> None:
        self.episode.append(episode.copy())
        row = (*before[:3], actions, rewards, truncated)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(np.array(value))
        for column, value in zip(self.after.values(), after[:3], strict=True):
            column.append(np.array(value))

    def trajectories(self, checkpoint: np.ndarray | int, temperature: np.ndarray | float) -> Trajectories:
        episode = np.concatenate(self.episode)
        whole = episode >= 0
        order = np.argsort(episode, kind="stable")[(~whole).sum() :]
        lengths = np.bincount(episode[whole])
        last = order[np.cumsum(lengths) - 1]
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        return Trajectories(
            self.task,
            episode_starts=np.cumsum(lengths) - lengths,
            truncated=columns.pop("truncated")[last],
            checkpoint=np.broadcast_to(np.int32(checkpoint), lengths.shape).copy(),
            temperature=np.broadcast_to(np.float32(temperature), lengths.shape).copy(),
            **{name: column[order] for name, column in columns.items()},
            **{f"final_{name}": np.concatenate(parts)[last] for name, parts in self.after.items()},
        )


class RecordEpisodes(gym.vector.VectorWrapper):
    """Records the whole episodes of a `DynamicObstaclesVectorEnv`: wrap the environment that PPO learns in, read
    `trajectories()` afterwards. This is the post's way of collecting: PPO's own history.

    Left out is what is no whole episode: one that a reset or an assignment of states breaks off, or that had begun
    before; and the step that does nothing but reset, in NEXT_STEP mode. Raises ValueError for another environment.
    """

    env: gridworld.DynamicObstaclesVectorEnv

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        if not isinstance(env, gridworld.DynamicObstaclesVectorEnv):
            itself = f"a DynamicObstaclesVectorEnv itself, not {type(env).__name__}"
            raise ValueError(f"env must be {itself}: put other wrappers around the recorder")
        super().__init__(env)
        self.recorder = _Recorder(env.task)
        self.playing = np.full(env.num_envs, -1)  # the episode that each is in; −1: none that is whole
        self.led_to = np.zeros((env.num_envs, 1))  # the states after the last step, as columns
        self.begun_at: list[int] = []  # environment steps taken when each episode began
        self.ended: list[int] = []
        self.steps = 0

    def step(self, actions: Any) -> tuple[Any, ...]:
        """Step the environment, keeping the states before and after."""
        before = self.env.state
        images, rewards, terminated, truncated, infos = self.env.step(actions)
        self._begin(before)
        led_to, done = self.env.state, terminated | truncated
        final = infos.get("final_info") or led_to._asdict()
        after = GridState(*(final[name] for name in GridState._fields))
        taken = np.asarray(actions, dtype=np.uint8)
        self.recorder.add(self.playing, before, taken, rewards, truncated & ~terminated, after)
        self.steps += self.num_envs
        self.ended += self.playing[done & (self.playing >= 0)].tolist()
        self.playing[done], self.led_to = -1, np.column_stack(led_to)
        return images, rewards, terminated, truncated, infos

    def _begin(self, before: GridState) -> None:
        """Say which episode each sub-environment was in before a step: one goes on where its last step has led."""
        self.playing[(np.column_stack(before) != self.led_to).any(1)] = -1
        first = before.step_count == 0
        self.playing[first] = len(self.begun_at) + np.arange(first.sum())
        self.begun_at += [self.steps] * int(first.sum())

    def trajectories(self) -> Trajectories:
        """Return all episodes that have ended, in the order in which they did; `checkpoint` is when they began.

        That counts all environment steps of the recorder, those of an earlier training too. Raises ValueError
        where none has ended.
        """
        if not self.ended:
            raise ValueError("no episode has ended yet: step the recorder until one has")
        return self.recorder.trajectories(np.array(self.begun_at), 1.0).episodes(np.array(self.ended))
