"""Episodes of any Gymnasium task whose observations are minigrid's images, for training a transformer on them.

The book's own task stores states and follows the observations from them (`trajectories`); for a task that has no
such simulator, `record` keeps the images themselves, 147 bytes a step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from jaxtyping import Float32, Int, Int64, UInt8

from dtbook.trajectories.agent import require
from dtbook.trajectories.ppo import check_envs

ImagePolicy = Callable[[np.ndarray], np.ndarray]
"""Images (batch, 7, 7, 3) → actions (batch)."""

_Step = tuple[np.ndarray, int, float]  # image, action, reward


@dataclass(frozen=True)
class ImageEpisodes:
    """Episodes as columns, one after another; what `training.train` asks of its data. Raises ValueError if empty."""

    images: UInt8[np.ndarray, "steps 7 7 3"]
    """What the agent saw before each action."""
    actions: Int64[np.ndarray, " steps"]
    episode_starts: Int64[np.ndarray, " episodes"]
    """Row of each episode's first step."""
    returns: Float32[np.ndarray, " episodes"]
    """Sum of each episode's rewards."""

    def __post_init__(self) -> None:
        if not len(self.episode_starts):
            raise ValueError("episode_starts must name at least one episode, but there is none")

    @property
    def lengths(self) -> Int64[np.ndarray, " episodes"]:
        """Return the steps in each episode."""
        return np.diff(self.episode_starts, append=len(self.actions))

    @property
    def classes(self) -> Int64[np.ndarray, " episodes"]:
        """Return 0, 1 or 2 for a return below, of, or above 0."""
        return np.sign(self.returns).astype(np.int64) + 1

    def observations(self, rows: Int[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch 7 7 3"]:
        """Return what the agent saw at some step rows."""
        return self.images[rows]


def record(
    envs: "gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]",
    policy: ImagePolicy,
    episodes: int,
    seed: int,
) -> ImageEpisodes:
    """Play at least `episodes` episodes to their end, all that were begun with them included, and return them.

    Episodes that begin later are not taken, so short ones are not over-represented. Raises ValueError for
    environments that `ppo.check_envs` refuses, and for fewer than one episode.
    """
    check_envs(envs)
    require(episodes >= 1, "episodes", episodes, "at least 1")
    images, _ = envs.reset(seed=seed)
    steps: list[list[_Step]] = [[] for _ in range(envs.num_envs)]
    ended: list[list[_Step]] = []
    begun, playing = envs.num_envs, np.ones(envs.num_envs, dtype=bool)
    while playing.any():
        seen, actions = np.array(images), np.array(policy(images))  # copies: both may be buffers
        images, rewards, terminated, truncated, _ = envs.step(actions)
        for lane in np.flatnonzero(playing):
            steps[lane].append((seen[lane], int(actions[lane]), float(rewards[lane])))
            if terminated[lane] or truncated[lane]:
                ended.append(steps[lane])
                steps[lane], playing[lane] = [], begun < episodes
                begun += begun < episodes
    lengths = np.array([len(episode) for episode in ended])
    rows = [row for episode in ended for row in episode]
    return ImageEpisodes(
        np.stack([row[0] for row in rows]),
        np.array([row[1] for row in rows], dtype=np.int64),
        np.cumsum(lengths) - lengths,
        np.array([sum(row[2] for row in episode) for episode in ended], dtype=np.float32),
    )
