"""Another Gymnasium task: what is recorded is what minigrid shows and pays; a transformer learns DoorKey from it."""

from itertools import pairwise

import gymnasium
import jaxtyping
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from minigrid.core.actions import Actions
from minigrid.core.constants import OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.wrappers import ImgObsWrapper
from planted import scattered

from dtbook import training
from dtbook.model import DTConfig
from dtbook.rollout import rollout_in
from dtbook.training import TrainConfig
from dtbook.trajectories.anytask import ImageEpisodes, record

ENV_ID = "MiniGrid-DoorKey-5x5-v0"


def make(max_steps=12):
    return ImgObsWrapper(gymnasium.make(ENV_ID, max_steps=max_steps))


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


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(
        ValueError, match=r"envs\.metadata\['autoreset_mode'\] must be SAME_STEP, not .*NEXT_STEP"
    ):
        record(vector(1, AutoresetMode.NEXT_STEP), turning, 1, seed=0)
    dicts = SyncVectorEnv([lambda: gymnasium.make(ENV_ID)], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=r"envs\.single_observation_space must be square uint8 images"):
        record(dicts, turning, 1, seed=0)
    with pytest.raises(ValueError, match="episodes must be at least 1, not 0"):
        record(vector(1), turning, 0, seed=0)


def test_buffers_that_are_written_anew_are_copied():
    """With `copy=False` every step writes into the images of the step before; a policy may do so with its actions."""
    buffer = np.zeros(3, int)

    def reusing(images):
        buffer[:] = turning(images)
        return buffer

    envs = SyncVectorEnv([make] * 3, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    data, expected = record(envs, reusing, 6, seed=4), record(vector(3), turning, 6, seed=4)
    for name in ("images", "actions", "episode_starts", "returns"):
        np.testing.assert_array_equal(getattr(data, name), getattr(expected, name))
    np.testing.assert_array_equal(data.actions, turning(data.images))


def test_no_episode_is_refused():
    with pytest.raises(ValueError, match="episode_starts must name at least one episode"):
        ImageEpisodes(
            np.zeros((0, 7, 7, 3), np.uint8), np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
        )


# Recorded, learnt and played: DoorKey

KEY_STEPS = 100
WANDERING = {Actions.left: 0.2, Actions.right: 0.2, Actions.forward: 0.6}
KEY_SHAPE = DTConfig(
    d_model=32,
    d_head=16,
    d_mlp=32,
    n_actions=7,
    n_timesteps=2,
    max_steps=KEY_STEPS,
    encoding="one-hot",
)
KEY_TRAINING = TrainConfig(
    steps=200,
    batch_size=128,
    lr=1e-2,
    warmup_steps=10,
    last_step_share=0.0,
    balance_classes=False,
    evaluation_episodes=0,
)


def at_hand(images):
    """Whether the cell in front holds a key, and whether it holds a locked door."""
    front = images[:, 3, 5]
    locked = (front[:, 0] == OBJECT_TO_IDX["door"]) & (front[:, 2] == STATE_TO_IDX["locked"])
    return front[:, 0] == OBJECT_TO_IDX["key"], locked


def handy(rng):
    """An agent that picks up the key and unlocks the door when they are in front of it, and wanders else."""

    def policy(images):
        wandering = rng.choice(list(WANDERING), p=list(WANDERING.values()), size=len(images))
        return np.select(at_hand(images), [Actions.pickup, Actions.toggle], wandering)

    return policy


class Witness(gymnasium.Wrapper):
    """Notes what was seen, done and paid at each step, and whether the episode was then over."""

    def __init__(self, env):
        super().__init__(env)
        self.rows = []

    def reset(self, **kwargs):
        self.image, info = self.env.reset(**kwargs)
        return self.image, info

    def step(self, action):
        before = self.image
        self.image, reward, terminated, truncated, info = self.env.step(action)
        self.rows.append((before, int(action), reward, terminated or truncated))
        return self.image, reward, terminated, truncated, info


@pytest.fixture(scope="module")
def doorkey():
    """Episodes of the handy agent, and what training made of them."""
    envs = SyncVectorEnv([lambda: make(KEY_STEPS)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    data = record(envs, handy(np.random.default_rng(0)), 60, seed=0)
    with pytest.MonkeyPatch.context() as patch:  # `train` is annotated for the book's own trajectories only
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return data, training.train(data, KEY_SHAPE, KEY_TRAINING, 0, progress=False)


def test_on_doorkey_the_loss_falls_to_the_entropy_of_who_was_recorded(doorkey):
    data, result = doorkey
    assert 0.1 < (data.returns > 0).mean() < 0.9
    losses, wanders = result.curve["loss"], np.isin(data.actions, list(WANDERING)).mean()
    assert len(losses) == KEY_TRAINING.steps
    assert np.isfinite(losses).all()
    assert losses[0] > 0.8 * np.log(7)  # who knows nothing of seven actions is at log 7
    entropy = -sum(p * np.log(p) for p in WANDERING.values())
    assert losses[-20:].mean() == pytest.approx(wanders * entropy, abs=0.08)


@torch.no_grad()
def test_on_doorkey_it_has_learnt_when_to_pick_up_and_when_to_unlock(doorkey):
    data, result = doorkey
    assert result.model.W_U.shape == (32, 7)
    images, rtgs = torch.from_numpy(data.images)[:, None], torch.full((len(data.images), 1), 0.9)
    probabilities = result.model(images, rtgs, torch.full((len(images), 1), 10))[:, 0].softmax(-1).numpy()
    assert probabilities.shape == (len(data.images), 7)
    key, locked = at_hand(data.images)
    assert key.sum() >= 20
    assert locked.sum() >= 20
    assert probabilities[key, Actions.pickup].mean() > 0.8
    assert probabilities[locked, Actions.toggle].mean() > 0.8
    assert probabilities[~(key | locked)][:, list(WANDERING)].sum(1).mean() > 0.9


def replayed(model, asked, greedy):
    """What `rollout_in` says of one lane, what a witness in it noted, and where the witness's episodes begin."""
    witness = Witness(make(KEY_STEPS))
    envs = SyncVectorEnv([lambda: witness], autoreset_mode=AutoresetMode.SAME_STEP)
    played = rollout_in(envs, model, asked, greedy=greedy, seed=1)
    images, actions, rewards, over = (np.array(column) for column in zip(*witness.rows, strict=True))
    return played, images, actions, rewards, np.flatnonzero(np.concatenate([[True], over]))


def test_on_doorkey_returns_and_lengths_are_minigrid_s(doorkey):
    asked = np.repeat([0.0, 0.9], 8)
    played, _, actions, rewards, starts = replayed(doorkey[1].model, asked, greedy=False)
    assert played["rtg"].tolist() == asked.tolist()
    assert played["length"].tolist() == np.diff(starts).tolist()
    np.testing.assert_allclose(played["return"], np.add.reduceat(rewards, starts[:-1]), rtol=1e-6)
    assert (played["return"] > 0).any(), "by way of the key and the door, it gets there now and then"
    assert {Actions.pickup, Actions.toggle} <= set(actions)


@torch.no_grad()
def test_on_doorkey_greedy_actions_are_the_likeliest_of_seven():
    """Windows of two timesteps cut by hand, through the hooked forward pass of a model that heeds every input."""
    model, asked = scattered(KEY_SHAPE), np.array([-0.5, 0.9])
    for loud in (model.W_E_time, model.W_E_action):
        loud.mul_(8)  # else a view that does not change is met with one action for ever
    _, images, actions, _, starts = replayed(model, asked, greedy=True)
    for episode, (start, end) in enumerate(pairwise(starts)):
        for row in range(start, end):
            first = max(row - 1, start)
            logits = model(
                torch.from_numpy(images[None, first : row + 1]),
                torch.full((1, row + 1 - first), asked[episode], dtype=torch.float64),
                torch.arange(first - start, row + 1 - start)[None],
                torch.from_numpy(actions[None, first:row]),
            )
            assert actions[row] == logits[0, -1].argmax()
    assert len(set(actions)) > 3
