"""Episodes as columns: saved, loaded, exported to Minari and read back.

A `Trajectories` stores *states* (agent cell, direction, obstacle cells), one row a step, and not observations:
twenty times smaller, and the observation follows exactly from the state (`gridworld.observe`).
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64, UInt8

from dtbook import gridworld
from dtbook.artifacts.parameters import cast, require
from dtbook.artifacts.store import atomic_write
from dtbook.gridworld.rules import ACTIONS, GridState, Task

if TYPE_CHECKING:
    from minari import MinariDataset

CLASS_NAMES = ("−1", "0", "+")
"""The three classes of episodes, by the sign of their return: died, truncated, reached the goal."""


@dataclass(frozen=True)
class Trajectories:
    """Whole episodes of one task, as columns; row i of a step column is what was seen and done at step i.

    Steps of one episode are consecutive; episode e holds rows `episode_starts[e]` up to the next start.
    `final_*` is the state that the last action led to. `checkpoint` (environment steps PPO had taken) and
    `temperature` (of the softmax; negative: ε-greedy with ε = −temperature over the sampled policy) say who
    played. Raises ValueError, naming the column, where columns do not fit together.
    """

    task: Task
    agent: UInt8[np.ndarray, " steps"]
    direction: UInt8[np.ndarray, " steps"]
    obstacles: UInt8[np.ndarray, "steps n_obstacles"]
    actions: UInt8[np.ndarray, " steps"]
    rewards: Float32[np.ndarray, " steps"]
    episode_starts: Int64[np.ndarray, " episodes"]
    truncated: Bool[np.ndarray, " episodes"]
    final_agent: UInt8[np.ndarray, " episodes"]
    final_direction: UInt8[np.ndarray, " episodes"]
    final_obstacles: UInt8[np.ndarray, "episodes n_obstacles"]
    checkpoint: Int32[np.ndarray, " episodes"]
    temperature: Float32[np.ndarray, " episodes"]

    def __post_init__(self) -> None:
        check_columns(self, {"n_obstacles": self.task.n_obstacles})
        most = self.actions.max(initial=0)
        require(most < len(ACTIONS), "actions", most, f"from 0 to {len(ACTIONS) - 1} at every step")

    @property
    def lengths(self) -> Int64[np.ndarray, " episodes"]:
        """Return the steps in each episode."""
        return np.diff(self.episode_starts, append=len(self.actions))

    @property
    def returns(self) -> Float32[np.ndarray, " episodes"]:
        """Return the undiscounted return of each episode, which is its last reward: all others are zero."""
        return self.rewards[self.episode_starts + self.lengths - 1]

    @property
    def classes(self) -> Int64[np.ndarray, " episodes"]:
        """Return 0, 1 or 2 for a return of −1, of 0, or above 0 (`CLASS_NAMES`)."""
        return np.sign(self.returns).astype(np.int64) + 1

    def timesteps(self, rows: Int[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the timestep within its episode of each step row."""
        episode = np.searchsorted(self.episode_starts, rows, side="right") - 1
        return np.asarray(rows - self.episode_starts[episode], dtype=np.int64)

    def states(self, rows: Int[np.ndarray, " batch"]) -> GridState:
        """Return the states at some step rows, their step counts included."""
        t = self.timesteps(rows).astype(np.int32)
        return GridState(self.agent[rows], self.direction[rows], self.obstacles[rows], t)

    def observations(self, rows: Int[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch 7 7 3"]:
        """Return what the agent saw at some step rows."""
        return gridworld.observe(self.states(rows), self.task.size)

    def episodes(
        self, selection: Int[np.ndarray, " selected"] | Bool[np.ndarray, " episodes"]
    ) -> "Trajectories":
        """Return some of the episodes (indices or a mask of all), as new Trajectories; raise ValueError for others."""
        index = _indices(selection, len(self.episode_starts))
        lengths = self.lengths[index]
        starts = np.cumsum(lengths) - lengths
        rows = np.repeat(self.episode_starts[index] - starts, lengths) + np.arange(lengths.sum())
        columns = {name: getattr(self, name)[rows] for name in STEP_COLUMNS}
        columns |= {name: getattr(self, name)[index] for name in EPISODE_COLUMNS}
        return Trajectories(self.task, episode_starts=starts, **columns)

    @staticmethod
    def concatenate(parts: "Iterable[Trajectories]") -> "Trajectories":
        """Return all episodes of several Trajectories of the same task, in order."""
        parts = list(parts)
        if len({part.task for part in parts}) != 1:
            raise ValueError(f"parts must share one task, not {sorted({str(part.task) for part in parts})}")
        offsets = np.cumsum([0] + [len(part.actions) for part in parts[:-1]])
        starts = [part.episode_starts + offset for part, offset in zip(parts, offsets, strict=True)]
        columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in STEP_COLUMNS}
        columns |= {name: np.concatenate([getattr(p, name) for p in parts]) for name in EPISODE_COLUMNS}
        return Trajectories(parts[0].task, episode_starts=np.concatenate(starts), **columns)

    def save(self, path: str | Path) -> None:
        """Write one compressed .npz, without pickle, atomically; the same episodes give the same bytes."""
        self.__post_init__()  # columns can be written to
        columns = {name: getattr(self, name) for name in (*STEP_COLUMNS, *EPISODE_COLUMNS, "episode_starts")}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, task=np.array(json.dumps(asdict(self.task))), **columns)

    @classmethod
    def load(cls, path: str | Path) -> "Trajectories":
        """Read what `save` wrote. Raises ValueError, naming the file, where it is not whole or not ours."""
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            task = Task(**json.loads(str(columns.pop("task"))))
            return cls(task, **columns)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            why = str(error).split(". ")[0]  # what NumPy says next is how to let a file run code
            why = "it holds pickled objects" if "pickle" in why else why
            raise ValueError(f"{path} is not a whole trajectory file ({why}); `save` writes one") from error

    def to_minari(self, dataset_id: str, **metadata: Any) -> "MinariDataset":
        """Write the episodes as a Minari dataset (observations are images; the states travel in `infos`).

        `metadata` goes to `minari.create_dataset_from_buffers` (author, algorithm_name …). Each step's `infos` say of
        which task it is, so parts of the dataset and several combined can be read back. A dataset that fails on its way
        is taken away.
        """
        import minari  # an optional dependency, slow to import
        from minari.data_collector import EpisodeBuffer
        from minari.storage.datasets_root_dir import get_dataset_path

        buffers = [EpisodeBuffer(id=e, **self._minari_episode(e)) for e in range(len(self.episode_starts))]
        metadata = {"description": json.dumps(asdict(self.task)), **metadata}
        images, actions = gym.spaces.Box(0, 255, (7, 7, 3), np.uint8), gym.spaces.Discrete(3)
        was_there = (folder := get_dataset_path(dataset_id)).exists()
        try:
            return minari.create_dataset_from_buffers(
                dataset_id, buffers, observation_space=images, action_space=actions, **metadata
            )
        except BaseException:
            if not was_there:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _minari_episode(self, e: int) -> dict[str, Any]:
        rows = self.episode_starts[e] + np.arange(self.lengths[e])
        last = np.zeros(len(rows), dtype=bool)
        last[-1] = True
        states = GridState(
            np.append(self.agent[rows], self.final_agent[e]),
            np.append(self.direction[rows], self.final_direction[e]),
            np.concatenate([self.obstacles[rows], self.final_obstacles[[e]]]),
            np.arange(len(rows) + 1, dtype=np.int32),
        )
        whose = {"checkpoint": self.checkpoint[e], "temperature": self.temperature[e]}
        whose["task"] = np.array([*asdict(self.task).values()], dtype=np.int32)
        return {
            "observations": gridworld.observe(states, self.task.size),
            "actions": self.actions[rows].astype(np.int64),
            "rewards": self.rewards[rows],
            "terminations": last & ~self.truncated[e],
            "truncations": last & self.truncated[e],
            "infos": states._asdict()
            | {n: np.stack([value] * (len(rows) + 1)) for n, value in whose.items()},
        }

    @classmethod
    def from_minari(cls, dataset: "MinariDataset") -> "Trajectories":
        """Read back what `to_minari` wrote, from a dataset opened with Minari's own loader, filtered or combined too.

        Raises ValueError for a dataset that `to_minari` did not write, one without episodes, and one of several tasks.
        """
        episodes = list(dataset.iterate_episodes())
        infos: list[dict[str, np.ndarray]] = [episode.infos or {} for episode in episodes]
        task = _task_of(dataset, infos)
        lengths = np.array([len(episode.actions) for episode in episodes])
        columns = {name: np.concatenate([i[name][:-1] for i in infos]) for name in GridState._fields[:3]}
        columns |= {f"final_{name}": np.stack([i[name][-1] for i in infos]) for name in GridState._fields[:3]}
        return cls(
            task,
            actions=np.concatenate([e.actions for e in episodes]).astype(np.uint8),
            rewards=np.concatenate([e.rewards for e in episodes]).astype(np.float32),
            episode_starts=np.cumsum(lengths) - lengths,
            truncated=np.array([bool(e.truncations[-1]) for e in episodes]),
            checkpoint=np.array([i["checkpoint"][0] for i in infos], dtype=np.int32),
            temperature=np.array([i["temperature"][0] for i in infos], dtype=np.float32),
            **columns,
        )


STEP_COLUMNS = ("agent", "direction", "obstacles", "actions", "rewards")
EPISODE_COLUMNS = tuple(
    field.name
    for field in fields(Trajectories)
    if field.name not in (*STEP_COLUMNS, "task", "episode_starts")
)


def _task_of(dataset: "MinariDataset", infos: list[dict[str, np.ndarray]]) -> Task:
    """Return the one task that all episodes of a dataset are of, as infos say it, or for older ones the description."""

    def task_in(info: dict[str, np.ndarray]) -> Task:
        if missing := {*GridState._fields[:3], "checkpoint", "temperature"} - info.keys():
            raise KeyError(missing)
        if "task" not in info:
            return Task(**json.loads(dataset.storage.metadata["description"]))
        size, n_obstacles, max_steps, random_start = info["task"][0].tolist()
        return Task(size, n_obstacles, max_steps, bool(random_start))

    name = dataset.spec.dataset_id
    try:
        tasks = {task_in(info) for info in infos}
    except (KeyError, TypeError, ValueError) as error:
        allowed = "hold states and their task, as to_minari writes them"
        raise ValueError(f"dataset must {allowed}, but {name!r} does not") from error
    if len(tasks) != 1:
        raise ValueError(f"dataset must have episodes of one task, but {name!r} has those of {len(tasks)}")
    return tasks.pop()


def _indices(selection: np.ndarray, episodes: int) -> np.ndarray:
    """Return which of so many episodes are selected by indices or by a mask."""
    if selection.dtype == bool and selection.shape == (episodes,):
        return np.flatnonzero(selection)
    if selection.dtype.kind not in "iu" or selection.ndim != 1:
        given = f"{selection.dtype} of shape {selection.shape}"
        raise ValueError(f"selection must be indices or a mask of all {episodes} episodes, not {given}")
    if (outside := selection[(selection < -episodes) | (selection >= episodes)]).size:
        raise ValueError(f"selection must name episodes below {episodes}, not {outside[0]}")
    return selection


def check_columns(data: Any, axes: dict[str, int]) -> None:
    """Cast the columns of a dataclass of episodes to its annotations and hold them to each other, in place.

    Axes of one name are equally long, as long as `axes` says if it does. Raises ValueError naming the column whose
    shape or numbers are off.
    """
    first = ("actions", "episode_starts")  # which say how many steps and episodes there are
    columns: list[Any] = [field for field in fields(data) if hasattr(field.type, "dim_str")]
    for name, kind in sorted(((f.name, f.type) for f in columns), key=lambda column: column[0] not in first):
        column = cast(name, getattr(data, name), kind.dtypes[0])
        _measure(name, column.shape, kind.dim_str.split(), axes)
        object.__setattr__(data, name, column)
    starts, steps = data.episode_starts, axes["steps"]
    rising = starts[:1].tolist() == [0] and (np.diff(starts, append=steps) > 0).all()
    allowed = f"the first row of each episode, rising from 0 and below the {steps} steps there are"
    require(bool(rising or len(starts) == steps == 0), "episode_starts", starts.tolist(), allowed)


def _measure(name: str, shape: tuple[int, ...], dims: list[str], axes: dict[str, int]) -> None:
    """Raise ValueError for a shape that is not `dims` (names or numbers) with these axes; add new ones to them."""
    sizes = dict(axes)
    same = (
        n == (int(dim) if dim.isdigit() else sizes.setdefault(dim, n))
        for dim, n in zip(dims, shape, strict=False)
    )
    if len(shape) != len(dims) or not all(same):
        known = ", ".join(f"{dim} = {axes[dim]}" if dim in axes else dim for dim in dims)
        raise ValueError(f"{name} has shape {shape}; it must be ({known}).")
    axes |= sizes
