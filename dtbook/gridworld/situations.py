"""Situations the agent can be in, as predicates over observations; batches of them; counterfactual pairs.

A situation is decided by the observation alone, so `select(all_observations(), situation)` is all of it, and
`weights` says what share of the states each observation stands for. Batches are what a model is called with:
one timestep, every observation with the same RTG and timestep. They are views of the images, made one at a
time, so walking over all observations needs little more memory than the images themselves.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from dtbook.artifacts.parameters import Count, Whole, checked
from dtbook.gridworld.decomposition import EMPTY_CELL
from dtbook.gridworld.env import ObservationSet
from dtbook.gridworld.kernels import EMPTY, GOAL, OBSTACLE, WALL
from dtbook.gridworld.rules import FRONT

Images = UInt8[np.ndarray, "n 7 7 3"]

IN_FRONT = {"empty": EMPTY, "wall": WALL, "obstacle": OBSTACLE, "goal": GOAL}
# Which hand has the wall when the goal is in front; see `showing`.
AT_HAND = {"goal from the top": (2, 6), "goal from the left": (4, 6)}
SITUATIONS = (*IN_FRONT, *AT_HAND)
FACING = tuple(name for name in SITUATIONS if name != "empty")
"""Situations in which there is something in front of the agent."""

MODEL_BATCH = 8192


def showing(images: Images, situation: str) -> Bool[np.ndarray, " n"]:
    """Return which observations show a situation, one of `SITUATIONS`; raises ValueError for any other name.

    "empty", "wall", "obstacle" and "goal" say what the cell in front of the agent, image[3, 5], holds. "goal
    from the top" is the agent above the goal, facing down; "goal from the left" is left of it, facing right.

    These two are poses, yet the observation tells them apart. The goal is in the room's lower right corner,
    so it can be in front of the agent in these two poses only: its other neighbours are wall. Facing down, the
    agent has the right-hand (east) wall at its left hand, image[2, 6], and the room at its right hand, image[4,
    6]; facing right, it has the lower (south) wall at its right hand and the room at its left. Nothing stands
    between the agent and these cells, nothing stands in a wall, and no wall stands inside the room. So with
    the goal in front, a wall at the left hand is "from the top", a wall at the right hand "from the left", and
    there is always exactly one of them.
    """
    if situation not in SITUATIONS:
        raise ValueError(f"situation must be one of {', '.join(map(repr, SITUATIONS))}, not {situation!r}.")
    front = images[:, *FRONT, 0]
    if situation in IN_FRONT:
        return front == IN_FRONT[situation]
    return (front == GOAL) & (images[:, *AT_HAND[situation], 0] == WALL)


HANDS = {"left": (2, 6), "right": (4, 6)}
"""The cells beside the agent."""


def at_hand(images: Images, hand: str) -> Bool[np.ndarray, " n"]:
    """Return which observations have a wall at the agent's "left" or "right" hand, whatever is in front."""
    return images[:, *HANDS[hand], 0] == WALL


def select(observations: ObservationSet, situation: str) -> ObservationSet:
    """Return the observations that show a situation, in their order; raises ValueError for an unknown one."""
    return observations[showing(observations.images, situation)]


def weights(observations: ObservationSet) -> Float64[np.ndarray, " n"]:
    """Return the share of these observations' states that show each: multiplicity, summing to 1.

    Raises ValueError where there is no observation, as no mean could be taken over it.
    """
    total = observations.multiplicity.sum()
    if not total:
        raise ValueError("observations is empty: no state of this task shows the situation.")
    return observations.multiplicity / total


@checked
def sample(
    observations: ObservationSet, n: Whole, rng: np.random.Generator
) -> tuple[ObservationSet, Int64[np.ndarray, " n"]]:
    """Return `n` observations drawn as often as states show them, with replacement, and their rows."""
    rows = rng.choice(len(observations), n, p=weights(observations))
    return replace(observations[rows], multiplicity=np.ones(n, np.int64)), rows


class ObservationBatch(NamedTuple):
    """The inputs of a model, `model(*batch.inputs)`, and what each row counts."""

    states: UInt8[Tensor, "batch 1 7 7 3"]
    rtgs: Float[Tensor, "batch 1"]
    timesteps: Int64[Tensor, "batch 1"]
    weights: Float64[Tensor, " batch"]
    """Shares of the whole set, summing to 1 over all its batches, in float64: float32 loses the sum."""
    rows: slice
    """Where in the set these observations are."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of the model."""
        return self.states, self.rtgs, self.timesteps


@checked
def row_batches(n: Whole, batch_size: Count) -> Iterator[slice]:
    """Yield the rows 0 … n − 1, `batch_size` at a time; raises ValueError for a wrong `batch_size` at once."""
    return (slice(start, min(start + batch_size, n)) for start in range(0, n, batch_size))


@checked
def batches(
    observations: ObservationSet, rtg: float, timestep: Whole, batch_size: Count = MODEL_BATCH
) -> Iterator[ObservationBatch]:
    """Yield all observations in order, `batch_size` at a time, each with this `rtg` and `timestep`.

    The states share the images' memory: edit a copy. Raises ValueError before the first batch for an empty
    set or a wrong `batch_size`; the model says what it thinks of RTG and timestep.
    """
    share = torch.from_numpy(weights(observations))
    return (
        _batch(observations.images[rows], share[rows], rows, rtg, timestep)
        for rows in row_batches(len(share), batch_size)
    )


def _batch(images: np.ndarray, share: Tensor, rows: slice, rtg: float, timestep: int) -> ObservationBatch:
    n = len(images)
    rtgs, timesteps = torch.full((n, 1), float(rtg)), torch.full((n, 1), timestep, dtype=torch.int64)
    return ObservationBatch(torch.from_numpy(images).unsqueeze(1), rtgs, timesteps, share, rows)


def without_front(states: UInt8[Tensor, "*batch 7 7 3"]) -> UInt8[Tensor, "*batch 7 7 3"]:
    """Return a copy of the observations in which the cell in front of the agent, and no other, is empty."""
    states = states.clone()
    states[..., *FRONT, :] = torch.tensor(EMPTY_CELL, dtype=torch.uint8)
    return states


@checked
def counterfactual_pairs(
    observations: ObservationSet,
    rtg: float,
    timestep: Whole,
    situation: str = "obstacle",
    batch_size: Count = MODEL_BATCH,
) -> Iterator[tuple[ObservationBatch, ObservationBatch]]:
    """Yield (clean, corrupted) batches: observations of a situation, and the same with an empty front cell.

    Rows and weights are those of `select(observations, situation)`. The corrupted one is the smallest change
    of what the model sees, not always a view the task can show: a room without its goal or with a gap in its
    wall is none, nor is one with an obstacle too few where no cell is left out of view to hold it. Raises as
    `select` and `batches`, before the first pair.
    """
    clean = batches(select(observations, situation), rtg, timestep, batch_size)
    return ((batch, batch._replace(states=without_front(batch.states))) for batch in clean)
