"""Another Gymnasium task: what is recorded is what minigrid shows and pays; a transformer learns DoorKey from it."""

import re
from dataclasses import replace
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit, TransformAction, TransformReward
from minigrid.core.actions import Actions
from minigrid.core.constants import OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.wrappers import (
    FlatObsWrapper,
    FullyObsWrapper,
    ImgObsWrapper,
    OneHotPartialObsWrapper,
    RGBImgObsWrapper,
    RGBImgPartialObsWrapper,
    ViewSizeWrapper,
)
from planted import scattered

from dtbook import training
from dtbook.gridworld import DynamicObstaclesVectorEnv
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.rollout import rollout_in
from dtbook.training import TrainConfig
from dtbook.trajectories import ppo
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


def test_other_ways_of_resetting_are_refused():
    with pytest.raises(ValueError, match=r"NEXT_STEP.*; it must be AutoresetMode\.SAME_STEP"):
        record(vector(1, AutoresetMode.NEXT_STEP), turning, 1, seed=0)


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
    with pytest.raises(
        ValueError, match=r"episode_starts is .*; it must be the first row of at least one episode"
    ):
        ImageEpisodes(
            np.zeros((0, 7, 7, 3), np.uint8), np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
        )


def refused(sentence, call, *args, **kwargs):
    """Assert that a call raises ValueError with one sentence that holds this."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


COLUMNS = {
    "images": np.zeros((5, 7, 7, 3), np.uint8),
    "actions": np.arange(5),
    "episode_starts": np.array([0, 2, 3]),
    "returns": np.array([-1, 0, 0.5], np.float32),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, bool, list])
def test_columns_of_other_types_are_cast(as_users_run_it, dtype):
    actions = np.array([0, 1, 1, 0, 1])
    data = ImageEpisodes(
        COLUMNS["images"].astype(np.int64),
        actions.tolist() if dtype is list else actions.astype(dtype),
        COLUMNS["episode_starts"].astype(np.uint16),
        [-1, 0, 0.5],
    )
    assert (data.images.dtype, data.actions.dtype, data.episode_starts.dtype, data.returns.dtype) == (
        np.uint8,
        np.int64,
        np.int64,
        np.float32,
    )
    assert data.actions.tolist() == actions.tolist()
    assert data.lengths.tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("images", np.zeros((5, 3, 7, 7), np.uint8), "images has shape (5, 3, 7, 7); it must be (steps = 5, view,"),
        ("images", np.zeros((4, 7, 7, 3), np.uint8), "images has shape (4, 7, 7, 3); it must be (steps = 5, view,"),
        ("images", np.zeros((5, 7, 6, 3), np.uint8), "images has shape (5, 7, 6, 3); it must be (steps = 5, view,"),
        ("images", np.zeros((5, 7, 7, 20), np.uint8), "images has shape (5, 7, 7, 20); it must be"),
        ("images", np.full((5, 7, 7, 3), 255, np.uint8), "images[..., 0] is 255; it must be minigrid's index"),
        ("images", np.full((5, 7, 7, 3), 0.5), "images is 0.5; it must be a number that uint8 holds"),
        ("actions", np.arange(4), "images has shape (5, 7, 7, 3); it must be (steps = 4, view, view, 3)."),
        ("actions", np.arange(5) - 1, "actions is -1; it must be 0 or more at every step."),
        ("actions", np.arange(5) / 2, "actions is 0.5; it must be a number that int64 holds"),
        ("actions", np.zeros((5, 1)), "actions has shape (5, 1); it must be (steps)."),
        ("actions", np.array(["left"] * 5), "actions is ['left', 'left', 'left', 'left', 'left']; it must be numbers"),
        ("episode_starts", [2, 3, 5], "episode_starts is [2, 3, 5]; it must be the first row of each episode"),
        ("episode_starts", [0, 3, 5], "episode_starts is [0, 3, 5]; it must be the first row of each episode"),
        ("episode_starts", [0, 3, 3], "episode_starts is [0, 3, 3]; it must be the first row of each episode"),
        ("returns", np.zeros(5), "returns has shape (5,); it must be (episodes = 3)."),
        ("returns", [0, np.nan, 1], "returns is nan; it must be a number that float32 holds"),
        ("returns", [0, 1e300, 1], "returns is 1e+300; it must be a number that float32 holds"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_named(as_users_run_it, column, value, sentence):
    refused(sentence, ImageEpisodes, **(COLUMNS | {column: value}))


# Which environments


def in_lanes(*makes):
    return SyncVectorEnv(makes, autoreset_mode=AutoresetMode.SAME_STEP)


def never(images):
    raise AssertionError("a step was taken")


ELSEWHERE = {
    "Dict": (lambda env: env, "envs.single_observation_space is Dict("),
    "flat": (FlatObsWrapper, "(2835,), uint8); it must be a Box of square uint8 images"),
    "one-hot": (lambda env: ImgObsWrapper(OneHotPartialObsWrapper(env)), "(7, 7, 20), uint8); it must be a Box of"),
    "pictures": (lambda env: ImgObsWrapper(RGBImgPartialObsWrapper(env)), "; it must be minigrid's index"),
    "pictures of all": (lambda env: ImgObsWrapper(RGBImgObsWrapper(env)), "; it must be minigrid's index"),
    "actions of another kind": (
        lambda env: TransformAction(ImgObsWrapper(env), int, Box(0, 1, (2,))),
        "envs.single_action_space is Box(0.0, 1.0, (2,), float32); it must be Discrete, from 0 on.",
    ),
    "actions from 1 on": (
        lambda env: TransformAction(ImgObsWrapper(env), int, Discrete(3, start=1)),
        "envs.single_action_space is Discrete(3, start=1); it must be Discrete, from 0 on.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrapper", "sentence"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_observations_and_actions_are_refused_before_any_step(wrapper, sentence):
    def envs():
        return in_lanes(lambda: NoStep(wrapper(gymnasium.make(ENV_ID, max_steps=12))))

    side = envs().single_observation_space.shape or (7,)
    model = DecisionTransformer(DTConfig(d_model=8, d_head=4, d_mlp=8, view_size=side[0]))
    refused(sentence, record, envs(), never, 1, seed=0)
    refused(sentence, rollout_in, envs(), model, [0.0])
    refused(sentence, ppo.train_ppo, envs(), ppo.PPOConfig(8, 8, minibatches=2), progress=False)


class NoStep(gymnasium.Wrapper):
    def step(self, action):
        raise AssertionError("a step was taken")


@pytest.mark.parametrize(
    ("wrapper", "side"),
    [
        (lambda env: ViewSizeWrapper(env, 5), 5),
        (lambda env: ViewSizeWrapper(env, 9), 9),
        (FullyObsWrapper, 6),
    ],
    ids=["view of 5", "view of 9", "whole grid"],
)
@pytest.mark.parametrize("n_timesteps", [1, 3])
def test_images_of_any_side_go_all_the_way(wrapper, side, n_timesteps):
    """Played by the model's own rule, b_U, the recorded episodes come back as `rollout_in` plays them."""
    build = lambda: ImgObsWrapper(wrapper(gymnasium.make("MiniGrid-DoorKey-6x6-v0", max_steps=9)))  # noqa: E731
    data = record(in_lanes(build, build), turning, 6, seed=1)
    assert data.images.shape[1:] == (side, side, 3)
    cfg = DTConfig(8, 1, 4, 8, n_timesteps=n_timesteps, max_steps=9, n_actions=7, view_size=side)
    config = TrainConfig(steps=30, batch_size=16, lr=0.03, balance_classes=False, evaluation_episodes=0)
    result = training.train(data, cfg, config, 0, progress=False)
    assert result.curve["loss"].iloc[-5:].mean() < result.curve["loss"].iloc[0]
    played = rollout_in(in_lanes(build, build), result.model, [0.0] * 3)
    assert (played["length"] <= 9).all()
    refused(
        f"DTConfig.view_size is 7; it must be that of data, {side}.",
        training.train,
        data,
        replace(cfg, view_size=7),
        config,
        0,
    )
    other = DecisionTransformer(replace(cfg, view_size=7))
    refused(
        f"the model's view_size is 7; it must be the task's, {side}.",
        rollout_in,
        in_lanes(build),
        other,
        [0.0],
    )


def test_a_model_that_does_not_fit_the_environments_is_refused_before_any_step():
    small = DTConfig(8, 1, 4, 8, max_steps=12, n_actions=7)
    envs = in_lanes(lambda: NoStep(make(12)))
    refused(
        "the model's n_actions is 8; it must be at most the task's, 7.",
        rollout_in,
        envs,
        DecisionTransformer(replace(small, n_actions=8)),
        [0],
    )
    for limited in (lambda: make(13), lambda: TimeLimit(make(99), 13), lambda: make(13)):
        envs = in_lanes(lambda: NoStep(make(5)), lambda limited=limited: NoStep(limited()))
        refused(
            "the task's max_steps is 13; it must be at most the model's, 12",
            rollout_in,
            envs,
            DecisionTransformer(small),
            [0],
        )
    rollout_in(in_lanes(lambda: TimeLimit(make(99), 12)), DecisionTransformer(small), [0])
    own = DynamicObstaclesVectorEnv(2, 5, 1, max_steps=13)
    refused(
        "the task's max_steps is 13", rollout_in, own, DecisionTransformer(replace(small, n_actions=3)), [0]
    )


def test_an_episode_that_outlasts_the_model_is_refused_where_nobody_said_how_long_it_is():
    turner = DecisionTransformer(DTConfig(8, 1, 4, 8, max_steps=12, n_actions=7))
    turner.b_U.data[0] = 1e3
    envs = AsyncVectorEnv([lambda: make(20)], autoreset_mode=AutoresetMode.SAME_STEP)
    refused(
        "the timestep of an episode is 13; it must be at most the model's, 12", rollout_in, envs, turner, [0]
    )
    envs.close()


def paying(reward):
    return TransformReward(make(), lambda _: reward)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_stop_the_game(reward):
    model = DecisionTransformer(DTConfig(8, 1, 4, 8, n_actions=7))
    envs, sentence = (
        in_lanes(lambda: paying(reward)),
        f"a reward of envs is {reward}; it must be a finite number.",
    )
    refused(sentence, record, envs, turning, 1, seed=0)
    refused(sentence, rollout_in, envs, model, [0])
    config = ppo.PPOConfig(8, 8, minibatches=2, encoding="index")
    refused(sentence, ppo.train_ppo, envs, config, progress=False)
    refused(sentence, ppo.evaluate_agent, ppo.ActorCritic(7, encoding="index"), envs, 1, True, 0)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda images: np.full(len(images), 7), ValueError, "actions must be from 0 to 6, not 7"),
        (lambda images: np.full(len(images), 0.5), TypeError, "actions must be whole numbers, not float64"),
        (lambda images: 2, ValueError, r"actions must have shape \(batch,\) = \(1,\), not \(\)"),
    ],
)
def test_actions_of_a_policy_that_are_none_are_refused(policy, error, message):
    with pytest.raises(error, match=message):
        record(vector(1), policy, 1, seed=0)


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
def recorded():
    """Episodes of the handy agent."""
    envs = SyncVectorEnv([lambda: make(KEY_STEPS)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    return record(envs, handy(np.random.default_rng(0)), 60, seed=0)


@pytest.fixture(scope="module")
def doorkey(recorded):
    """Those, and what training made of them."""
    return recorded, training.train(recorded, KEY_SHAPE, KEY_TRAINING, 0, progress=False)


@pytest.mark.slow
def test_on_doorkey_the_loss_falls_to_the_entropy_of_who_was_recorded(doorkey):
    data, result = doorkey
    assert 0.1 < (data.returns > 0).mean() < 0.9
    losses, wanders = result.curve["loss"], np.isin(data.actions, list(WANDERING)).mean()
    assert len(losses) == KEY_TRAINING.steps
    assert np.isfinite(losses).all()
    assert losses[0] > 0.8 * np.log(7)  # who knows nothing of seven actions is at log 7
    entropy = -sum(p * np.log(p) for p in WANDERING.values())
    assert losses[-20:].mean() == pytest.approx(wanders * entropy, abs=0.08)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("shape", "settings", "sentence"),
    [
        ({}, {}, "evaluation_episodes is 100; it must be 0 for ImageEpisodes, whose task is not the book's"),
        ({"n_actions": 3}, {}, "data's largest action is 5; it must be at most n_actions − 1 = 2."),
        ({"n_actions": 5}, {}, "data's largest action is 5; it must be at most n_actions − 1 = 4."),
        ({"max_steps": 20}, {}, "data must hold episodes of 1 to 20 steps (max_steps)"),
        ({"view_size": 5}, {}, "DTConfig.view_size is 5; it must be that of data, 7."),
        ({}, {"balance_classes": True}, "balance_classes needs episodes of every return"),
    ],
)
def test_data_model_and_evaluation_are_held_to_each_other_before_the_first_step(
    recorded, monkeypatch, shape, settings, sentence
):
    monkeypatch.setattr(training.Updater, "__call__", never)
    cfg = replace(KEY_SHAPE, **shape)
    config = TrainConfig(**({"balance_classes": False} | settings))
    if settings or shape:
        config = replace(config, evaluation_episodes=0)
    refused(sentence, training.train, recorded, cfg, config, 0, progress=False)


def test_a_state_without_a_bit_is_refused_before_the_first_step(recorded, monkeypatch):
    monkeypatch.setattr(training.Updater, "__call__", never)
    images = recorded.images.copy()
    images[-1, 0, 0, 2] = 3  # the direction of an agent, which a whole grid shows
    data = replace(recorded, images=images)
    refused(
        "states[..., 2] reaches from 0 to 3", training.train, data, KEY_SHAPE, KEY_TRAINING, 0, progress=False
    )
