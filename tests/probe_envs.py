"""Probe environments: tasks so small that the right value and the right policy are known in closed form.

Each isolates one ability (after Andy Jones, "Debugging Reinforcement Learning Systems", 2021). All are tables
under one vector environment, which shows its state as the cell of an otherwise empty view that holds a ball.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

EMPTY, BALL = (1, 0, 0), (6, 2, 0)


def images_of(states: np.ndarray | Sequence[int]) -> np.ndarray:
    """What the agent sees in each state: uint8 (batch, 7, 7, 3)."""
    images = np.empty((len(states), 49, 3), dtype=np.uint8)
    images[:] = EMPTY
    images[np.arange(len(states)), states] = BALL
    return images.reshape(-1, 7, 7, 3)


class TabularVectorEnv(VectorEnv):
    """A deterministic Markov decision process given as tables, stepped for many environments at once.

    `next_state[s][a]` is the state that action a leads to from s, or −1 where it ends the episode for good;
    `reward[s][a]` what it pays. An episode starts in one of `starts`, uniformly, and is truncated after
    `max_steps` steps.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (Gymnasium's own idiom)

    def __init__(
        self,
        num_envs: int,
        next_state: Sequence[Sequence[int]],
        reward: Sequence[Sequence[float]],
        starts: Sequence[int] = (0,),
        max_steps: int = 1000,
    ) -> None:
        self.num_envs, self.max_steps = num_envs, max_steps
        self.next_state, self.reward, self.starts = map(np.array, (next_state, reward, starts))
        self.single_observation_space = Box(0, 255, (7, 7, 3), np.uint8)
        self.single_action_space = Discrete(self.reward.shape[1])
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _start(self, which: np.ndarray) -> None:
        self.state[which] = self.np_random.choice(self.starts, int(which.sum()))
        self.step_count[which] = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.step_count = np.zeros(self.num_envs, int), np.zeros(self.num_envs, int)
        self._start(np.ones(self.num_envs, bool))
        return images_of(self.state), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        rewards, after = self.reward[self.state, actions], self.next_state[self.state, actions]
        self.step_count += 1
        terminated, truncated = after < 0, self.step_count >= self.max_steps
        ended, infos = terminated | truncated, {}
        self.state = np.maximum(after, 0)
        if ended.any():
            infos = {"final_obs": np.full(self.num_envs, None, dtype=object), "_final_obs": ended}
            for i in np.flatnonzero(ended):
                infos["final_obs"][i] = images_of(self.state[[i]])[0]
        self._start(ended)
        return images_of(self.state), rewards, terminated, truncated, infos


END = -1


def constant_reward(num_envs: int) -> TabularVectorEnv:
    """One state, one action, one step, reward 1."""
    return TabularVectorEnv(num_envs, next_state=[[END]], reward=[[1.0]])


def reward_by_observation(num_envs: int, rewards: Sequence[float]) -> TabularVectorEnv:
    """One action, one step, in a state drawn uniformly; state s pays rewards[s]."""
    states = range(len(rewards))
    return TabularVectorEnv(num_envs, [[END] for _ in states], [[r] for r in rewards], starts=states)


def delayed_reward(num_envs: int, delay: int) -> TabularVectorEnv:
    """One action; states 0, 1 … delay in turn, and reward 1 on leaving the last."""
    after = [[state + 1] for state in range(delay)] + [[END]]
    return TabularVectorEnv(num_envs, after, [[0.0]] * delay + [[1.0]])


def reward_by_action(num_envs: int, rewards: Sequence[float]) -> TabularVectorEnv:
    """One state, one step; action a pays rewards[a]."""
    return TabularVectorEnv(num_envs, [[END] * len(rewards)], [rewards])


def reward_by_matching(num_envs: int, n: int) -> TabularVectorEnv:
    """One step in one of n states, drawn uniformly: the action of the same number pays 1, others −1."""
    return TabularVectorEnv(num_envs, [[END] * n] * n, 2 * np.eye(n) - 1, starts=range(n))


def delayed_choice(num_envs: int, delay: int) -> TabularVectorEnv:
    """The first action of two decides: 1 leads down a road that pays 1 after `delay` more steps, 0 ends."""
    after = [[END, 1]] + [[state + 1] * 2 for state in range(1, delay)] + [[END] * 2]
    return TabularVectorEnv(num_envs, after, [[0.0, 0.0]] * delay + [[1.0, 1.0]])


def cut_short(num_envs: int) -> TabularVectorEnv:
    """One action: state 0 pays nothing, state 1 after it pays 1 for ever; truncated after two steps."""
    return TabularVectorEnv(num_envs, [[1], [1]], [[0.0], [1.0]], max_steps=2)
