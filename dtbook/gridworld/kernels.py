"""The compiled inner loops of the grid world: plain arrays in, plain arrays out, one thread, no checks.

`dtbook.gridworld` checks what comes in and is what other modules call. A cell is one number, x + size·y,
and a pose is 4·cell + direction; tables have a row for each of the 256 numbers a cell can have.

Kernels carry `no_type_check` because numba must see the plain function, not the one a type checker has
wrapped.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Int16, UInt8
from minigrid.core.constants import COLOR_TO_IDX, DIR_TO_VEC, OBJECT_TO_IDX

VIEW_SIZE = 7  # cells a side of the agent's view; minigrid's default
N_BYTES = VIEW_SIZE * VIEW_SIZE * 3  # of one observation
# Where an observation holds the agent's own cell, (3, 6).
OWN = 3 * (VIEW_SIZE * (VIEW_SIZE // 2) + VIEW_SIZE - 1)

LEFT, RIGHT, FORWARD = range(3)
EMPTY, WALL, OBSTACLE, GOAL = (OBJECT_TO_IDX[name] for name in ("empty", "wall", "ball", "goal"))
WALL_COLOUR, OBSTACLE_COLOUR, GOAL_COLOUR = (COLOR_TO_IDX[name] for name in ("grey", "blue", "green"))

# minigrid places an obstacle by rejection: at most 101 draws from the nine cells of the 3×3 around it, of
# which `free` would do; if all fail the obstacle stays. GIVE_UP[free] is that chance: 1 with no free cell,
# 6.8e-6 with one.
GIVE_UP = np.array([((9 - free) / 9) ** 101 for free in range(9)])

FAULTS = (
    "direction must be 0 to 3",
    "step_count must not be negative",
    "agent must be a cell inside the walls",
    "obstacles must be cells inside the walls and off the goal",
    "obstacles must be off the agent's cell",
    "obstacles must be on cells that differ",
)


def compiled(kernel: Callable[..., Any], fastmath: bool = False) -> Callable[..., Any]:
    """Return the kernel, compiled by numba on its first call and kept on disk where a folder can be written to.

    `fastmath` lets it add up floating-point numbers in any order.
    """
    try:
        return numba.njit(cache=True, fastmath=fastmath)(kernel)
    except RuntimeError:
        # neither the package's folder nor the user's cache is writable: compile in every process
        return numba.njit(fastmath=fastmath)(kernel)


@lru_cache
def empty_room(size: int) -> UInt8[np.ndarray, " 256"]:
    """Return what stands on each cell of the empty room: EMPTY, GOAL, or WALL (also beyond the grid)."""
    cells = np.full(256, WALL, dtype=np.uint8)
    room = cells[: size * size].reshape(size, size)
    room[1:-1, 1:-1] = EMPTY
    room[-2, -2] = GOAL
    return cells


class Moves(NamedTuple):
    """Tables by which an obstacle moves: sets of neighbours as bits of a byte, in one fixed order of the eight."""

    around: UInt8[np.ndarray, " 256"]
    """around[cell]: the neighbours that are free in the empty room."""
    without: UInt8[np.ndarray, " 512"]
    """without[256 + other − cell]: all neighbours of `cell` but `other`."""
    n_members: UInt8[np.ndarray, " 256"]
    """n_members[neighbours]: how many they are."""
    shift: Int16[np.ndarray, "256 8"]
    """shift[neighbours, n]: from a cell to the n-th of these neighbours."""


@lru_cache
def move_tables(size: int) -> Moves:
    """Return the tables by which obstacles move in a room of this size."""
    shifts = np.array([dx + size * dy for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dx or dy])
    bit = 1 << np.arange(8)
    neighbours = np.clip(np.arange(256)[:, None] + shifts, 0, 255)  # right where it matters: inside the walls
    around = ((empty_room(size)[neighbours] == EMPTY) * bit).sum(axis=1)
    without = np.full(512, 255)
    without[256 + shifts] -= bit
    members = (np.arange(256)[:, None] & bit) > 0
    shift = np.zeros((256, 8), dtype=np.int16)
    for row, member in zip(shift, members, strict=True):
        row[: member.sum()] = shifts[member]
    return Moves(
        around.astype(np.uint8), without.astype(np.uint8), members.sum(axis=1).astype(np.uint8), shift
    )


class Views(NamedTuple):
    """Tables of what the agent sees from each pose."""

    background: UInt8[np.ndarray, "1024 {N_BYTES}"]
    """The view of the empty room, `image[i, j, channel]` at 21·i + 3·j + channel."""
    offset: Int16[np.ndarray, "1024 256"]
    """Where in it each cell's object byte is, the agent's own cell included, or −1 for a cell out of view."""


@lru_cache
def view_tables(size: int) -> Views:
    """Return the tables by which observations are drawn in a room of this size."""
    y, x = np.divmod(np.arange(256), size)
    dx, dy = x - x[:, None, None], y - y[:, None, None]  # (agent's cell, 1, cell)
    # of the way the agent looks, (direction, 1)
    east, south = np.array(DIR_TO_VEC)[:, :, None].swapaxes(0, 1)
    i = VIEW_SIZE // 2 - south * dx + east * dy  # cells to the right, counted from the left edge
    j = VIEW_SIZE - 1 - east * dx - south * dy  # cells ahead, counted from the top edge
    seen = (i >= 0) & (i < VIEW_SIZE) & (j >= 0) & (j < VIEW_SIZE) & (np.arange(256) < size * size)
    offset = np.where(seen, 3 * (VIEW_SIZE * i + j), -1).reshape(1024, 256).astype(np.int16)

    room = empty_room(size)
    colour = np.select([room == WALL, room == GOAL], [WALL_COLOUR, GOAL_COLOUR], 0)
    background = np.tile(np.array([WALL, WALL_COLOUR, 0], dtype=np.uint8), (1024, VIEW_SIZE * VIEW_SIZE))
    pose, cell = np.nonzero(offset >= 0)
    background[pose, offset[pose, cell]] = room[cell]
    background[pose, offset[pose, cell] + 1] = colour[cell]
    background[:, OWN : OWN + 3] = EMPTY, 0, 0  # minigrid shows nothing where the agent is, not even the goal
    return Views(background, offset)


@compiled
@no_type_check
def find_fault(agent, direction, obstacles, step_count, room):
    """Return (row, index into FAULTS) of the first state that cannot be, or (−1, −1)."""
    for row in range(agent.shape[0]):
        if direction[row] > 3:
            return row, 0
        if step_count[row] < 0:
            return row, 1
        if room[agent[row]] == WALL:
            return row, 2
        for k in range(obstacles.shape[1]):
            if room[obstacles[row, k]] != EMPTY:
                return row, 3
            if obstacles[row, k] == agent[row]:
                return row, 4
            for other in range(k):
                if obstacles[row, k] == obstacles[row, other]:
                    return row, 5
    return -1, -1


@compiled
@no_type_check
def find_outside(numbers, end):
    """Return the row of the first number that is not from 0 to end − 1, or −1."""
    for row in range(numbers.shape[0]):
        if numbers[row] < 0 or numbers[row] >= end:
            return row
    return -1


@compiled
@no_type_check
def begin_rows(agent, direction, obstacles, step_count, rows, deck, random_start, words):
    """Put `rows` into first states of episodes, in place, from random `words` in [0, 1).

    The cells are dealt from `deck` (the start cell first) by a partial Fisher-Yates shuffle, which is
    uniform whatever order the row before has left the deck in.
    """
    for i in range(rows.shape[0]):
        row = rows[i]
        direction[row] = 0
        step_count[row] = 0
        if random_start:
            direction[row] = np.int64(4 * words[i, 0])
            pick = np.int64(deck.shape[0] * words[i, 1])
            deck[0], deck[pick] = deck[pick], deck[0]
        agent[row] = deck[0]
        for k in range(obstacles.shape[1]):
            pick = k + 1 + np.int64((deck.shape[0] - k - 1) * words[i, k + 2])
            deck[k + 1], deck[pick] = deck[pick], deck[k + 1]
            obstacles[row, k] = deck[k + 1]


@compiled
@no_type_check
def mark_taken(agent, direction, obstacles, room, size, ahead, taken):
    """Write the cell in front of each agent, and whether a wall or an obstacle is there."""
    forward = np.array([1, size, -1, -size])
    for row in range(agent.shape[0]):
        cell = np.int64(agent[row]) + forward[direction[row]]
        ahead[row] = cell
        taken[row] = room[cell] == WALL
        for k in range(obstacles.shape[1]):
            taken[row] |= obstacles[row, k] == cell


@compiled
@no_type_check
def move_obstacles(agent, obstacles, words, around, without, n_members, shift):
    """Move each obstacle in turn, in place, to one of the free cells around it, by random `words` in [0, 1).

    A word chooses among the free cells; the fraction left over decides whether minigrid would have given
    up. Rows run in the inner loop because they, unlike a row's obstacles, do not wait for each other: 1.7
    times as fast.
    """
    for k in range(obstacles.shape[1]):
        for row in range(agent.shape[0]):
            cell = np.int64(obstacles[row, k])
            free = around[cell] & without[256 + np.int64(agent[row]) - cell]
            for other in range(obstacles.shape[1]):
                free &= without[256 + np.int64(obstacles[row, other]) - cell]
            word = words[k, row] * n_members[free]
            pick = np.int64(word)
            if word - pick >= GIVE_UP[n_members[free]]:
                obstacles[row, k] = cell + shift[free, pick]


@compiled
@no_type_check
def act(agent, direction, step_count, actions, ahead, not_clear, taken, room, max_steps, reward, over):
    """Turn or move each agent, in place, and write its reward and whether it is (terminated, truncated).

    `not_clear` is what was in front before the obstacles moved, `taken` what is there now.
    """
    turn = np.array([3, 1, 0])
    for row in range(agent.shape[0]):
        forward = actions[row] == FORWARD
        at_goal = forward & (room[ahead[row]] == GOAL)
        step_count[row] += 1
        direction[row] = (direction[row] + turn[actions[row]]) & 3
        agent[row] = ahead[row] if forward & ~taken[row] else agent[row]
        reward[row] = -1.0 if forward & not_clear[row] else 0.0
        if at_goal:
            reward[row] = 1 - 0.9 * (step_count[row] / max_steps)
        over[0, row] = at_goal | (forward & not_clear[row])
        over[1, row] = step_count[row] >= max_steps


@compiled
@no_type_check
def advance(
    agent,
    direction,
    obstacles,
    step_count,
    actions,
    words,
    room,
    size,
    max_steps,
    around,
    without,
    n_members,
    shift,
    reward,
    over,
):
    """Step every environment, in place; write reward (batch,) and (terminated, truncated) (2, batch)."""
    batch = agent.shape[0]
    ahead = np.empty(batch, np.uint8)
    not_clear, taken = np.empty(batch, np.bool_), np.empty(batch, np.bool_)
    mark_taken(agent, direction, obstacles, room, size, ahead, not_clear)
    move_obstacles(agent, obstacles, words, around, without, n_members, shift)
    mark_taken(agent, direction, obstacles, room, size, ahead, taken)
    act(agent, direction, step_count, actions, ahead, not_clear, taken, room, max_steps, reward, over)


@compiled
@no_type_check
def draw_rows(agent, direction, obstacles, rows, background, offset, images):
    """Write the observations of `rows` into theirs of `images`: the empty room first, then the obstacles."""
    for row in rows:
        pose = 4 * np.int64(agent[row]) + np.int64(direction[row])
        for byte in range(N_BYTES):
            images[row, byte] = background[pose, byte]
        for k in range(obstacles.shape[1]):
            start = offset[pose, obstacles[row, k]]
            if start >= 0:
                images[row, start] = OBSTACLE
                images[row, start + 1] = OBSTACLE_COLOUR


@compiled
@no_type_check
def advance_and_draw(
    old_agent,
    old_direction,
    old_obstacles,
    old_step_count,
    agent,
    direction,
    obstacles,
    step_count,
    actions,
    words,
    room,
    size,
    max_steps,
    around,
    without,
    n_members,
    shift,
    background,
    offset,
    reward,
    over,
    images,
    ended,
):
    """Do what `advance` does, into new states; draw them, and write which rows are over; return how many.

    All in one call, as every call from Python and every function of numpy costs a microsecond.
    """
    batch = agent.shape[0]
    for row in range(batch):
        agent[row], direction[row], step_count[row] = old_agent[row], old_direction[row], old_step_count[row]
        for k in range(obstacles.shape[1]):
            obstacles[row, k] = old_obstacles[row, k]
    advance(
        agent,
        direction,
        obstacles,
        step_count,
        actions,
        words,
        room,
        size,
        max_steps,
        around,
        without,
        n_members,
        shift,
        reward,
        over,
    )
    draw_rows(agent, direction, obstacles, range(batch), background, offset, images)
    n_ended = 0
    for row in range(batch):
        ended[n_ended] = row
        n_ended += over[0, row] | over[1, row]
    return n_ended


@compiled
@no_type_check
def restart(
    agent, direction, obstacles, step_count, rows, deck, random_start, words, background, offset, images
):
    """Do what `begin_rows` and then `draw_rows` do."""
    begin_rows(agent, direction, obstacles, step_count, rows, deck, random_start, words)
    draw_rows(agent, direction, obstacles, rows, background, offset, images)
