"""Every observation the task can show, and its faces: Gymnasium's vector environment and minigrid's own.

The task itself, states in and states out, is `dtbook.gridworld.rules`. `DynamicObstaclesVectorEnv` is its face to
Gymnasium and `to_minigrid` the way back to minigrid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jaxtyping import Int64, UInt8
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Goal
from minigrid.envs import DynamicObstaclesEnv

from dtbook.artifacts.parameters import Count, checked
from dtbook.gridworld import kernels
from dtbook.gridworld.decomposition import Parts, take_apart
from dtbook.gridworld.kernels import VIEW_SIZE
from dtbook.gridworld.rules import (
    ACTIONS,
    START_CELL,
    GridState,
    Task,
    begin,
    begin_and_draw,
    check_actions,
    check_state,
    free_cells,
    observe,
    reset,
    step_and_draw,
    unchecked_observe,
)

RowIndex = slice | npt.NDArray[Any] | Sequence[int] | int | np.integer
"""Which observations: a slice, a mask, integers, or one."""
_FINAL_INFO = (*GridState._fields, *(f"_{name}" for name in GridState._fields))  # each with Gymnasium's mask
MAX_OBSERVATIONS = 10_000_000  # that `all_observations` lists; 147 bytes each


@dataclass(frozen=True, eq=False)
class ObservationSet:
    """Distinct observations, how many states show each, and one state that does.

    It is indexed by rows: `observations[rows]` is the set of those, for a slice, a mask, integers or one integer.
    """

    images: UInt8[np.ndarray, "n 7 7 3"]
    multiplicity: Int64[np.ndarray, " n"]
    witness: GridState

    @cached_property
    def parts(self) -> Parts:
        """Each image as a view without obstacles and its obstacles, found when first asked for."""
        return take_apart(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: RowIndex) -> ObservationSet:
        rows = [int(rows)] if isinstance(rows, int | np.integer) else rows
        witness = GridState(*(value[rows] for value in self.witness))
        return ObservationSet(self.images[rows], self.multiplicity[rows], witness)


def all_observations(size: int = 8, n_obstacles: int = 4) -> ObservationSet:
    """Return every observation the task can show the agent before it acts, in a fixed order.

    Two poses (cell, direction) of the agent with the same view of the empty room show the same
    observations, and no others do: an observation is such a view with some of its empty cells holding
    obstacles, and taking these out gives the view back. In each pose that has the view, C(free cells out
    of view, obstacles out of view) states show it; `multiplicity` adds these up, obstacles counted as
    alike and whatever the step, and sums to the number of states, 4·f·C(f − 1, n_obstacles) for f =
    (size − 2)² − 1 cells. The agent on the goal is left out: there the episode is over.

    Every one of these states is reached. With random starts each is a first state. From the fixed start:
    wherever the agent stands, the cells left to the obstacles hang together by sides and corners, so that
    while it turns on the spot they can come from any arrangement into any other, whichever way it then
    faces; and it can step into a neighbouring cell from any arrangement that leaves that cell clear, so
    it comes to all of them. (The tests walk through every state of sizes 5 and 6; a longer walk, done
    once, came through every state of size 8.)

    Raises ValueError where there are more than `MAX_OBSERVATIONS`, saying how many.
    """
    Task(size, n_obstacles)
    groups = _poses_by_view(size)
    total = sum(
        math.comb(len(seen), k) for _, seen, unseen in groups for k in _visible(seen, unseen, n_obstacles)
    )
    if total > MAX_OBSERVATIONS:
        raise ValueError(
            f"n_obstacles {n_obstacles} on size {size} makes {total:,} distinct observations, more than the "
            f"{MAX_OBSERVATIONS:,} that `all_observations` lists."
        )
    parts = [
        _observations_of(poses, seen, unseen, k, n_obstacles)
        for poses, seen, unseen in groups
        for k in _visible(seen, unseen, n_obstacles)
    ]
    pose, multiplicity, obstacles = (np.concatenate(column) for column in zip(*parts, strict=True))
    witness = GridState(
        (pose // 4).astype(np.uint8), (pose % 4).astype(np.uint8), obstacles, np.zeros(total, np.int32)
    )
    return ObservationSet(observe(witness, size), multiplicity, witness)


def _poses_by_view(size: int) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """Return, for each view of the empty room, the poses with it and the first one's free cells in and out of view."""
    background, offset = kernels.view_tables(size)
    free = free_cells(size)
    poses = defaultdict(list)
    for pose in (4 * free[:, None].astype(int) + np.arange(4)).ravel().tolist():
        poses[background[pose].tobytes()].append(pose)
    groups = []
    for group in poses.values():
        others = free[free != group[0] // 4]
        in_view = offset[group[0], others] >= 0
        groups.append((group, others[in_view], others[~in_view]))
    return groups


def _visible(seen: np.ndarray, unseen: np.ndarray, n_obstacles: int) -> range:
    """Return how many of the obstacles can be in view."""
    return range(max(0, n_obstacles - len(unseen)), min(n_obstacles, len(seen)) + 1)


def _observations_of(
    poses: list[int], seen: np.ndarray, unseen: np.ndarray, k: int, n_obstacles: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (pose, multiplicity, obstacles) of the observations with `k` obstacles in view, for one background."""
    rows = math.comb(len(seen), k)
    visible = np.fromiter(chain.from_iterable(combinations(seen.tolist(), k)), np.uint8, rows * k).reshape(
        rows, k
    )
    hidden = np.tile(unseen[: n_obstacles - k], (rows, 1))
    multiplicity = len(poses) * math.comb(len(unseen), n_obstacles - k)
    return np.full(rows, poses[0]), np.full(rows, multiplicity), np.hstack([visible, hidden])


def to_minigrid(
    task: Task, state: GridState, index: int = 0, render_mode: str | None = None
) -> DynamicObstaclesEnv:
    """Return minigrid's own environment in state `index` of the batch, its random numbers those of seed 0."""
    check_state(task, state)
    env = DynamicObstaclesEnv(
        size=task.size,
        n_obstacles=task.n_obstacles,
        max_steps=task.max_steps,
        agent_start_pos=None if task.random_start else START_CELL,
        render_mode=render_mode,
    )
    env.reset(seed=0)
    inject(env, state, index)
    return env


def inject(env: DynamicObstaclesEnv, state: GridState, index: int = 0) -> None:
    """Put minigrid's environment, already reset, into state `index` of the batch."""
    size = env.width
    env.grid = Grid(size, size)
    env.grid.wall_rect(0, 0, size, size)
    env.put_obj(Goal(), size - 2, size - 2)
    env.obstacles = [Ball() for _ in range(state.obstacles.shape[1])]
    for ball, cell in zip(env.obstacles, state.obstacles[index].tolist(), strict=True):
        env.put_obj(ball, cell % size, cell // size)
    env.agent_pos = (int(state.agent[index]) % size, int(state.agent[index]) // size)
    env.agent_dir = int(state.direction[index])
    env.step_count = int(state.step_count[index])


class DynamicObstaclesVectorEnv(gymnasium.vector.VectorEnv):
    """The task as a Gymnasium vector environment: observations are the (7, 7, 3) images, actions 0, 1 and 2.

    In SAME_STEP mode the observation returned with the last step of an episode is the first of the next; the
    last observation is in `infos["final_obs"]` and the last state, by its fields, in `infos["final_info"]`, in
    the rows where `infos["_final_obs"]` is true. NEXT_STEP and DISABLED are as in Gymnasium's SyncVectorEnv.
    """

    metadata = {  # noqa: RUF012 (Gymnasium's own name and type)
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }

    @checked
    def __init__(
        self,
        num_envs: Count = 1,
        size: int = 8,
        n_obstacles: int = 4,
        max_steps: int = 300,
        random_start: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Check the arguments; raise ValueError naming the one that is off, its value and what is allowed."""
        if autoreset_mode not in (*AutoresetMode, *(mode.value for mode in AutoresetMode)):
            allowed = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise ValueError(f"autoreset_mode must be one of {allowed}, not {autoreset_mode!r}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'rgb_array', not {render_mode!r}.")
        self.task = Task(size, n_obstacles, max_steps, random_start)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (VIEW_SIZE, VIEW_SIZE, 3), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(len(ACTIONS))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: GridState | None = None
        self._over = np.empty(0, np.int64)  # the environments that are over

    @property
    def state(self) -> GridState:
        """Return the states of all environments, a copy; assign to it to set them."""
        return GridState(*(value.copy() for value in self._started()))

    @state.setter
    def state(self, state: GridState) -> None:
        check_state(self.task, state)
        if len(state.agent) != self.num_envs:
            raise ValueError(f"state must hold num_envs = {self.num_envs} states, not {len(state.agent)}.")
        self._state = GridState(*(np.array(value, order="C") for value in state))
        self._over = np.empty(0, np.int64)

    def _started(self) -> GridState:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("Call reset() once before using the environments.")
        return self._state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the first observations; `options={"reset_mask": mask}` resets only the environments in the mask."""
        rows = self._rows_to_reset(options)
        super().reset(seed=seed)
        if len(rows) == self.num_envs:
            self._state = reset(self.task, self.num_envs, self.np_random)
        else:
            begin(self.task, self._started(), rows, self.np_random)
        self._over = np.setdiff1d(self._over, rows)
        return unchecked_observe(self._started(), self.task.size), {}

    def _rows_to_reset(self, options: dict[str, Any] | None) -> np.ndarray:
        unknown = set(options or ()) - {"reset_mask"}
        if unknown:
            raise ValueError(f"options may hold 'reset_mask', not {sorted(unknown)[0]!r}.")
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        shape = (self.num_envs,)
        is_mask = isinstance(mask, np.ndarray) and mask.shape == shape and mask.dtype == bool
        if not is_mask or not mask.any():
            raise ValueError(
                f"reset_mask must be a boolean array of shape {shape}, not all False, not {mask!r}."
            )
        return np.flatnonzero(mask)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Return observations, rewards, terminations, truncations and infos, one entry for each environment."""
        before, over = self._started(), self._over
        actions = check_actions(actions, self.num_envs)
        if self.autoreset_mode is AutoresetMode.DISABLED and len(over):
            raise gymnasium.error.ResetNeeded(
                f"Environments {over.tolist()} are over: reset them with options={{'reset_mask': mask}}."
            )
        transition, images, ended = step_and_draw(self.task, before, actions, self.np_random)
        state, rewards, terminated, truncated = transition
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and len(over):
            begin_and_draw(self.task, state, over, images, self.np_random)
            rewards[over], terminated[over], truncated[over] = 0, False, False
            ended = np.flatnonzero(terminated | truncated)
        if self.autoreset_mode is AutoresetMode.SAME_STEP and len(ended):
            infos = self._final_infos(state, images, ended)
            begin_and_draw(self.task, state, ended, images, self.np_random)
        self._state, self._over = state, ended
        return images, rewards, terminated, truncated, infos

    def _final_infos(self, state: GridState, images: np.ndarray, ended: np.ndarray) -> dict[str, Any]:
        """Return last observations and states of the episodes that are over, named and masked as Gymnasium does."""
        final_obs, over = np.empty(self.num_envs, dtype=object), np.zeros(self.num_envs, dtype=bool)
        over[ended] = True
        for row, image in zip(ended.tolist(), images.take(ended, 0), strict=True):
            final_obs[row] = image
        last = [value.copy() for value in (*state, over, over, over, over, over, over)]
        final_info = dict(zip(_FINAL_INFO, last, strict=False))
        return {
            "final_obs": final_obs,
            "final_info": final_info,
            "_final_obs": last[-2],
            "_final_info": last[-1],
        }

    def render(self) -> tuple[Any, ...] | None:
        """Return minigrid's picture of each environment, (height, width, 3) uint8; None without a `render_mode`."""
        if self.render_mode is None:
            return None
        state = self._started()
        return tuple(
            to_minigrid(self.task, state, row, self.render_mode).render() for row in range(self.num_envs)
        )
