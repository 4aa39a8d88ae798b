"""The rules of the task: what a state is, and how one follows another.

MiniGrid's Dynamic Obstacles, batched and exact. States are plain arrays, so any state can be set, stored
and compared; functions take a state and return a new one. `dtbook.gridworld` is what other modules call.
The rules are minigrid's own (`minigrid/envs/dynamicobstacles.py`, version 3), also where they surprise:

- Forward with an obstacle or a wall in front costs −1 and ends the episode. "In front" is judged *before*
  the obstacles move, so it costs −1 even when the obstacle moves away (the agent then steps into the cell
  it left).
- Obstacles move one after the other, each to a uniformly random free cell of the 3×3 around it, never onto
  the goal, the agent or the cell it is on. An obstacle that moves in front of the agent only blocks its
  way.
- An obstacle stays when no cell around it is free. minigrid gives up after 101 random tries, so an obstacle
  with one free cell stays with probability (8/9)^101 = 6.8e-6; that chance is kept.
- Reaching the goal pays 1 − 0.9·step/max_steps and ends the episode; the last step truncates it, and can do
  both.

What happens is a function of the states, the actions and the generator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import gymnasium
import minigrid  # noqa: F401 (registers its tasks)
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer, UInt8
from pydantic import Field, Strict

from dtbook.artifacts.parameters import AS_INTEGER, Checked, Flag, Whole, checked, require
from dtbook.gridworld import kernels
from dtbook.gridworld.kernels import EMPTY, FAULTS, VIEW_SIZE

ACTIONS = ("left", "right", "forward")  # minigrid's 0, 1 and 2
FRONT = (3, 5)  # image[FRONT] is the cell in front of the agent; the agent itself is at (3, 6)
START_CELL = (1, 1)  # x, y; facing east


@dataclass(frozen=True)
class Task(Checked):
    """A Dynamic Obstacles task; raises ValueError naming the field, its value and what is allowed."""

    size: Annotated[int, Strict(), Field(ge=5, le=16), AS_INTEGER] = 8
    """Cells a side, walls included: 5 to 16 (minigrid registers 5, 6, 8 and 16)."""
    n_obstacles: Whole = 4
    """0 to size // 2 + 1; minigrid silently changes larger numbers to size // 2."""
    max_steps: Annotated[int, Strict(), Field(ge=1, le=2**31 - 1), AS_INTEGER] = 300
    """Steps until truncation: the post's 300, where minigrid's default is 4·size²."""
    random_start: Flag = False
    """Start on any free cell facing anywhere, as minigrid's "-Random-" tasks; else at (1, 1) facing east."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.size // 2 + 1
        require(
            self.n_obstacles <= most, "Task.n_obstacles", self.n_obstacles, f"an integer from 0 to {most}"
        )

    @classmethod
    def from_env_id(cls, env_id: str, max_steps: int = 300) -> Task:
        """Return the task minigrid registers under `env_id`, such as "MiniGrid-Dynamic-Obstacles-Random-5x5-v0"."""
        spec = gymnasium.registry.get(env_id)
        if spec is None or spec.entry_point != "minigrid.envs:DynamicObstaclesEnv":
            known = sorted(
                name for name in gymnasium.registry if name.startswith("MiniGrid-Dynamic-Obstacles-")
            )
            raise ValueError(f"env_id must be one of {', '.join(known)}, not {env_id!r}.")
        kwargs = dict(spec.kwargs)
        random_start = kwargs.pop("agent_start_pos", START_CELL) is None
        return cls(max_steps=max_steps, random_start=random_start, **kwargs)


class GridState(NamedTuple):
    """States of a batch of environments; a cell is x + size·y, (0, 0) the north-west corner of the wall."""

    agent: UInt8[np.ndarray, " batch"]
    """The agent's cell."""
    direction: UInt8[np.ndarray, " batch"]
    """0 east, 1 south, 2 west, 3 north."""
    obstacles: UInt8[np.ndarray, "batch n_obstacles"]
    """The obstacles' cells, in the order in which they move."""
    step_count: Int32[np.ndarray, " batch"]
    """Steps taken since the episode began."""


class Transition(NamedTuple):
    """The result of a step, a row an environment."""

    state: GridState
    reward: Float32[np.ndarray, " batch"]
    terminated: Bool[np.ndarray, " batch"]
    truncated: Bool[np.ndarray, " batch"]


def check_state(task: Task, state: GridState) -> None:
    """Raise TypeError or ValueError, in one sentence, where `state` is no state of `task`.

    The agent may stand on the goal and `step_count` may have reached `max_steps`: so episodes end.
    """
    batch = np.shape(state.agent)[:1]
    shapes = (batch, batch, (*batch, task.n_obstacles), batch)
    for name, value, shape, dtype in zip(
        GridState._fields, state, shapes, (np.uint8, np.uint8, np.uint8, np.int32), strict=True
    ):
        if not isinstance(value, np.ndarray) or value.dtype != dtype:
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name} must be an array of {np.dtype(dtype)}, not {kind}.")
        if len(batch) != 1 or value.shape != shape:
            expected = "(batch, n_obstacles)" if name == "obstacles" else "(batch,)"
            raise ValueError(f"{name} must have shape {expected} = {shape}, not {value.shape}.")
    row, fault = kernels.find_fault(*contiguous(state), kernels.empty_room(task.size))
    if row >= 0:
        values = ", ".join(f"{name} {value[row].tolist()}" for name, value in state._asdict().items())
        raise ValueError(f"{FAULTS[fault]}, but state {row} of a {task.size}×{task.size} grid has {values}.")


def contiguous(state: GridState) -> GridState:
    """Return the state in C order: numba compiles a kernel anew for each memory layout it meets."""
    return GridState(*map(np.ascontiguousarray, state))


@checked
def reset(task: Task, batch: Whole, rng: np.random.Generator) -> GridState:
    """Return `batch` first states of episodes, as minigrid draws them: all on cells that differ, off the goal."""
    agent, direction = np.empty((2, batch), np.uint8)
    obstacles = np.empty((batch, task.n_obstacles), np.uint8)
    state = GridState(agent, direction, obstacles, np.empty(batch, np.int32))
    begin(task, state, np.arange(batch), rng)
    return state


def begin(task: Task, state: GridState, rows: np.ndarray, rng: np.random.Generator) -> None:
    """Put `rows` of a state into first states of episodes, in place."""
    words = rng.random((len(rows), task.n_obstacles + 2))
    deck = free_cells(task.size).copy()  # which the kernel shuffles
    kernels.begin_rows(*state, rows, deck, task.random_start, words)


@lru_cache
def free_cells(size: int) -> UInt8[np.ndarray, " cells"]:
    """Return the cells inside the walls but the goal, in order, START_CELL first."""
    return np.flatnonzero(kernels.empty_room(size) == EMPTY).astype(np.uint8)


def step(
    task: Task,
    state: GridState,
    actions: Integer[np.ndarray, " batch"] | Bool[np.ndarray, " batch"],
    rng: np.random.Generator,
) -> Transition:
    """Return the transition each action (0 left, 1 right, 2 forward) makes; the inputs are left as they are.

    Episodes that are over go on if stepped, as minigrid's do; `DynamicObstaclesVectorEnv` restarts them.
    """
    check_state(task, state)
    return unchecked_step(task, state, check_actions(actions, len(state.agent)), rng)


def check_actions(actions: Any, batch: int, n_actions: int = len(ACTIONS)) -> Int64[np.ndarray, " batch"]:
    """Return the actions as int64 in C order; raise TypeError or ValueError, in one sentence, if one is none."""
    array = np.asarray(actions)
    if array.shape != (batch,):
        raise ValueError(f"actions must have shape (batch,) = ({batch},), not {array.shape}.")
    if array.dtype.kind not in "biu":
        raise TypeError(f"actions must be whole numbers, not {array.dtype}.")
    checked = np.ascontiguousarray(array, dtype=np.int64)
    row = kernels.find_outside(checked, n_actions)
    if row >= 0:
        wrong = array[row]
        own = "0 (left), 1 (right) or 2 (forward)"
        allowed = own if n_actions == len(ACTIONS) else f"from 0 to {n_actions - 1}"
        raise ValueError(f"actions must be {allowed}, not {wrong}.")
    return checked


def unchecked_step(task: Task, state: GridState, actions: np.ndarray, rng: np.random.Generator) -> Transition:
    """Return what `step` does, for a state and actions known to be right."""
    new = GridState(*(np.array(value, order="C") for value in state))
    words = rng.random((task.n_obstacles, len(actions)))
    room, moves = kernels.empty_room(task.size), kernels.move_tables(task.size)
    reward, over = np.empty(len(actions), np.float32), np.empty((2, len(actions)), np.bool_)
    kernels.advance(*new, actions, words, room, task.size, task.max_steps, *moves, reward, over)
    return Transition(new, reward, *over)


def step_and_draw(
    task: Task, state: GridState, actions: np.ndarray, rng: np.random.Generator
) -> tuple[Transition, np.ndarray, np.ndarray]:
    """Return what `step` and then `observe` do, for a state and actions known to be right, and which rows are over."""
    n, k = state.obstacles.shape
    words = rng.random((k, n))
    new = GridState(
        np.empty(n, np.uint8), np.empty(n, np.uint8), np.empty((n, k), np.uint8), np.empty(n, np.int32)
    )
    images = np.empty((n, VIEW_SIZE, VIEW_SIZE, 3), np.uint8)
    reward, over, ended = np.empty(n, np.float32), np.empty((2, n), np.bool_), np.empty(n, np.int64)
    room, moves, views = _tables(task.size)
    n_ended = kernels.advance_and_draw(
        *state,
        *new,
        actions,
        words,
        room,
        task.size,
        task.max_steps,
        *moves,
        *views,
        reward,
        over,
        images.reshape(n, kernels.N_BYTES),
        ended,
    )
    return Transition(new, reward, over[0], over[1]), images, ended[:n_ended]


@lru_cache
def _tables(size: int) -> tuple[np.ndarray, kernels.Moves, kernels.Views]:
    return kernels.empty_room(size), kernels.move_tables(size), kernels.view_tables(size)


def begin_and_draw(
    task: Task, state: GridState, rows: np.ndarray, images: np.ndarray, rng: np.random.Generator
) -> None:
    """Put `rows` of a state into first states of episodes and their observations into `images`, in place."""
    words, deck = rng.random((len(rows), task.n_obstacles + 2)), free_cells(task.size).copy()
    flat = images.reshape(-1, kernels.N_BYTES)
    kernels.restart(*state, rows, deck, task.random_start, words, *kernels.view_tables(task.size), flat)


def observe(state: GridState, size: int = 8) -> UInt8[np.ndarray, "batch 7 7 3"]:
    """Return the agent's view in each state, bit for bit minigrid's `obs["image"]`.

    `image[i, j]` is the cell i from the left and j from the top, the agent at (3, 6) looking up; walls hide
    nothing and everything beyond the grid is wall. Channels are object, colour and (always 0) state. The
    agent's own cell is shown empty.
    """
    check_state(_room(size, np.atleast_2d(state.obstacles).shape[1]), state)
    return unchecked_observe(contiguous(state), size)


_room = lru_cache(Task)


def unchecked_observe(state: GridState, size: int) -> np.ndarray:
    """Return what `observe` does, for a state known to be right."""
    images = np.empty((len(state.agent), VIEW_SIZE, VIEW_SIZE, 3), dtype=np.uint8)
    flat, rows = images.reshape(-1, kernels.N_BYTES), np.arange(len(images))
    kernels.draw_rows(*state[:3], rows, *kernels.view_tables(size), flat)
    return images
