"""The task: MiniGrid's Dynamic Obstacles, its rules as batched kernels, every observation, and the situations in it."""

from dtbook.gridworld.env import (
    DynamicObstaclesVectorEnv,
    ObservationSet,
    all_observations,
    inject,
    to_minigrid,
)
from dtbook.gridworld.kernels import EMPTY, GOAL, OBSTACLE, VIEW_SIZE, WALL
from dtbook.gridworld.rules import (
    ACTIONS,
    FRONT,
    GridState,
    Task,
    Transition,
    check_state,
    observe,
    reset,
    step,
)

__all__ = [
    "ACTIONS",
    "EMPTY",
    "FRONT",
    "GOAL",
    "OBSTACLE",
    "VIEW_SIZE",
    "WALL",
    "DynamicObstaclesVectorEnv",
    "GridState",
    "ObservationSet",
    "Task",
    "Transition",
    "all_observations",
    "check_state",
    "inject",
    "observe",
    "reset",
    "step",
    "to_minigrid",
]
