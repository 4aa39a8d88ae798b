"""Recording any Gymnasium task: what is kept is what minigrid itself shows and pays, episode by episode."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from minigrid.wrappers import ImgObsWrapper

from dtbook.anytask import ImageEpisodes, record

ENV_ID = "MiniGrid-DoorKey-5x5-v0"


def make():
    return ImgObsWrapper(gymnasium.make(ENV_ID, max_steps=12))


def vector(lanes, mode=AutoresetMode.SAME_STEP):
    return SyncVectorEnv([make] * lanes, autoreset_mode=mode)


def turning(images):
    """An action that follows from what is seen, so that a second player does the same."""
    return images.reshape(len(images), -1).sum(1) % 7


def test_a_recording_is_what_minigrid_shows_and_pays():
    data = record(vector(1), turning, 3, seed=4)
    assert len(data.lengths) == 3
    env = make()
    image, _ = env.reset(seed=4)
    for row, action in enumerate(data.actions):
        np.testing.assert_array_equal(data.images[row], image)
        assert action == turning(image[None])[0]
        image, _, terminated, truncated, _ = env.step(action)
        ends = row + 1 in {*data.episode_starts.tolist(), len(data.actions)}
        assert (terminated or truncated) == ends
        if ends:
            image, _ = env.reset()
    np.testing.assert_array_equal(data.observations(np.array([2, 0])), data.images[[2, 0]])


def test_every_episode_that_was_begun_is_there_and_no_other():
    for lanes, wanted in ((4, 4), (4, 10), (4, 2)):
        data = record(vector(lanes), turning, wanted, seed=0)
        assert len(data.episode_starts) == max(lanes, wanted)
        assert data.lengths.sum() == len(data.actions) == len(data.images)
        assert data.lengths.max() <= 12


def test_returns_are_the_sums_of_rewards_and_make_the_classes():
    images, actions = np.zeros((5, 7, 7, 3), np.uint8), np.arange(5)
    data = ImageEpisodes(images, actions, np.array([0, 2, 3]), np.array([-1, 0, 0.5], np.float32))
    assert data.lengths.tolist() == [2, 1, 2]
    assert data.classes.tolist() == [0, 1, 2]


def test_other_ways_of_resetting_are_refused():
    with pytest.raises(ValueError, match=r"envs must reset in the same step, not AutoresetMode\.NEXT_STEP"):
        record(vector(1, AutoresetMode.NEXT_STEP), turning, 1, seed=0)


def test_no_episode_is_refused():
    with pytest.raises(ValueError, match="episode_starts must name at least one episode"):
        ImageEpisodes(
            np.zeros((0, 7, 7, 3), np.uint8), np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
        )
