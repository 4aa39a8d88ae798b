"""Episodes of any Gymnasium task whose observations are minigrid's images, for training a transformer on them.

The book's own task stores states and follows the observations from them (`trajectories`); for a task that has no
such simulator, `record` keeps the images themselves, 147 bytes a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from jaxtyping import Float32, Int, Int64, UInt8
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

from dtbook.artifacts.parameters import Count, Whole, checked, refuse, require
from dtbook.gridworld.rules import check_actions
from dtbook.trajectories.episodes import check_columns

Envs = VectorEnv[Any, Any, Any]

ImagePolicy = Callable[[np.ndarray], np.ndarray]
"""Images (batch, view, view, 3) → actions (batch)."""

_Step = tuple[np.ndarray, int, float]  # image, action, reward


@dataclass(frozen=True)
class ImageEpisodes:
    """Episodes as columns, one after another; what `training.train` asks of its data.

    Raises ValueError, naming the column, where there is no episode or columns do not fit together.
    """

    images: UInt8[np.ndarray, "steps view view 3"]
    """What the agent saw before each action."""
    actions: Int64[np.ndarray, " steps"]
    episode_starts: Int64[np.ndarray, " episodes"]
    """Row of each episode's first step."""
    returns: Float32[np.ndarray, " episodes"]
    """Sum of each episode's rewards."""

    def __post_init__(self) -> None:
        check_columns(self, {})
        require(len(self.episode_starts) > 0, "episode_starts", [], "the first row of at least one episode")
        lowest = self.actions.min()
        require(lowest >= 0, "actions", lowest, "0 or more at every step")
        check_indices("images", self.images)

    @property
    def lengths(self) -> Int64[np.ndarray, " episodes"]:
        """Return the steps in each episode."""
        return np.diff(self.episode_starts, append=len(self.actions))

    @property
    def classes(self) -> Int64[np.ndarray, " episodes"]:
        """Return 0, 1 or 2 for a return below, of, or above 0."""
        return np.sign(self.returns).astype(np.int64) + 1

    def observations(self, rows: Int[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch view view 3"]:
        """Return what the agent saw at some step rows."""
        return self.images[rows]


@checked
def first_images(envs: Envs, seed: Whole) -> UInt8[np.ndarray, "batch view view 3"]:
    """Return the first images of environments that `check_envs` lets pass; raise ValueError if they are pictures."""
    images, _ = envs.reset(seed=seed)
    check_indices("envs's observations", images)
    return images


def check_indices(name: str, images: UInt8[np.ndarray, "batch view view 3"]) -> None:
    """Raise ValueError for images that do not hold minigrid's indices of objects and colours, as pictures do not."""
    for channel, known in enumerate((OBJECT_TO_IDX, COLOR_TO_IDX)):
        highest, most = images[..., channel].max(initial=0), max(known.values())
        allowed = f"minigrid's index of an object, a colour and a state, here up to {most}"
        require(highest <= most, f"{name}[..., {channel}]", highest, allowed)


def check_envs(envs: Envs) -> tuple[int, int]:
    """Return the number of actions and the side of the view (cells) of a vector environment.

    Raises ValueError, from what the environment says of itself, where it does not reset in the same step, does not
    show square images of minigrid's three indices, or has not as actions the numbers from 0 on.
    """
    images, actions = envs.single_observation_space, envs.single_action_space
    mode = envs.metadata.get("autoreset_mode")
    require(
        mode == AutoresetMode.SAME_STEP, "envs.metadata['autoreset_mode']", mode, "AutoresetMode.SAME_STEP"
    )
    shape = images.shape if images.dtype == np.uint8 and images.shape is not None else ()
    square = len(shape) == 3 and shape == (shape[0], shape[0], 3)
    allowed = "a Box of square uint8 images of minigrid's three indices (ImgObsWrapper gives them)"
    require(square, "envs.single_observation_space", images, allowed)
    if not isinstance(actions, Discrete) or actions.start != 0:
        refuse("envs.single_action_space", actions, "Discrete, from 0 on")
    return int(actions.n), shape[0]


def check_rewards(rewards: np.ndarray) -> None:
    """Raise ValueError for rewards that an environment paid and that are not all finite."""
    if not np.isfinite(rewards).all():
        refuse("a reward of envs", rewards[~np.isfinite(rewards)][0], "a finite number")


@checked
def record(envs: Envs, policy: ImagePolicy, episodes: Count, seed: Whole) -> ImageEpisodes:
    """Play at least `episodes` episodes to their end, all that were begun with them included, and return them.

    Episodes that begin later are not taken, so short ones are not over-represented. Raises ValueError for
    environments that `check_envs` refuses, and for an action or a reward that is none.
    """
    n_actions, _ = check_envs(envs)
    images = first_images(envs, seed)
    steps: list[list[_Step]] = [[] for _ in range(envs.num_envs)]
    ended: list[list[_Step]] = []
    begun, playing = envs.num_envs, np.ones(envs.num_envs, dtype=bool)
    while playing.any():
        seen = np.array(images)  # a copy: it may be a buffer
        actions = np.array(check_actions(policy(images), envs.num_envs, n_actions))
        images, rewards, terminated, truncated, _ = envs.step(actions)
        check_rewards(rewards)
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
