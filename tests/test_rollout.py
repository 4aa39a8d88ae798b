"""Acting: the policy does what the model says, and the curve is the one minigrid itself gives."""

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from minigrid.wrappers import ImgObsWrapper

from dtbook.gridworld import DynamicObstaclesVectorEnv, Task
from dtbook.model import DecisionTransformer, DTConfig
from dtbook.rollout import (
    ModelPolicy,
    calibration_curve,
    calibration_error,
    episode_table,
    outcomes,
    rollout,
    rollout_in,
)

TASK = Task(size=5, n_obstacles=2, max_steps=30)


def model_of(**shape):
    return DecisionTransformer(DTConfig(max_steps=30, **shape), seed=4)


@pytest.mark.parametrize("context", [1, 3, 9])
@pytest.mark.parametrize("encoding", ["index", "one-hot"])
def test_greedy_actions_are_the_models_argmax(context, encoding):
    """Replayed episode by episode: windows cut by hand, through the hooked forward pass."""
    model = model_of(n_timesteps=context, encoding=encoding, d_model=32, d_head=16, d_mlp=32)
    rtgs = np.array([-1.0, 0.0, 0.9, 0.5])
    played = rollout(model, rtgs, greedy=True, seed=1, task=TASK)
    for e, rtg in enumerate(rtgs):
        rows = played.episode_starts[e] + np.arange(played.lengths[e])
        images, actions = (
            torch.from_numpy(played.observations(rows)),
            torch.from_numpy(played.actions[rows].astype(int)),
        )
        for t in range(len(rows)):
            first = max(0, t - context + 1)
            n = t - first + 1
            logits = model(
                images[None, first : t + 1],
                torch.full((1, n), rtg),
                torch.arange(first, t + 1)[None],
                actions[None, first:t],
            )[0, -1]
            top = logits.topk(2)
            if top.values[0] - top.values[1] > 1e-4:
                assert top.indices[0] == actions[t], (e, t)


def test_sampled_actions_follow_the_softmax():
    model = model_of(d_model=32, d_head=16, d_mlp=32)
    model.W_U.data *= 30
    n = 20_000
    image = np.zeros((n, 7, 7, 3), np.uint8)
    image[:, 3, 5] = (6, 2, 0)
    policy = ModelPolicy(model, np.full(n, 0.9), False, np.random.default_rng(0))
    actions = policy(image, np.arange(n), np.zeros(n, dtype=np.int64))
    expected = model(
        torch.from_numpy(image[:1, None]), torch.tensor([[0.9]]), torch.zeros(1, 1, dtype=torch.int64)
    )
    expected = expected.softmax(-1)[0, 0].detach().numpy()
    assert expected.max() < 0.95, "a test of sampling needs a distribution with some spread"
    error = 4 * np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(np.bincount(actions, minlength=3) / n - expected) < error).all()


def always(action):
    model = model_of(d_model=32, d_head=16, d_mlp=32)
    model.b_U.data[action] = 1e3
    return model


def test_outcomes_of_models_that_cannot_surprise():
    ahead = rollout(always(2), np.zeros(200), seed=3, task=TASK)
    assert set(outcomes(ahead)) == {"wall", "obstacle"}
    blocked = ahead.observations(ahead.episode_starts + ahead.lengths - 1)[:, 3, 5, 0]
    assert np.array_equal(outcomes(ahead) == "wall", blocked == 2)
    turning = rollout(always(0), np.zeros(5), seed=3, task=TASK)
    assert set(outcomes(turning)) == {"truncated"}
    curve = calibration_curve(always(0), [0.0, 0.5], episodes=5, max_steps=30, task=TASK)
    assert curve["survived"].tolist() == [1, 1]
    assert calibration_error(curve) == pytest.approx(0.25)


def test_curve_against_pandas_by_hand():
    table = pd.DataFrame(
        {
            "rtg": [0.0] * 4,
            "return": [-1, 0, 0.5, 0.9],
            "length": [3, 30, 9, 5],
            "truncated": [False, True, False, False],
        }
    )
    from dtbook.rollout import summarise

    row = summarise(table).iloc[0]
    assert row["mean"] == pytest.approx(0.1)
    assert row["sem"] == pytest.approx(np.std([-1, 0, 0.5, 0.9], ddof=1) / 2)
    assert (row["succeeded"], row["survived"], row["died"]) == (0.5, 0.25, 0.25)
    assert row["low"] == pytest.approx(-1 + 0.075 * 1)


def test_rolling_out_is_deterministic():
    model, asked = model_of(d_model=32, d_head=16, d_mlp=32), np.full(50, 0.5)
    a, b = (episode_table(rollout(model, asked, seed=9, task=TASK), asked) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)


def minigrid_envs(n, max_steps, size=8, **how):
    env_id = f"MiniGrid-Dynamic-Obstacles-{size}x{size}-v0"
    make = lambda: ImgObsWrapper(gym.make(env_id, max_steps=max_steps))  # noqa: E731
    return gym.vector.SyncVectorEnv([make] * n, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP, **how)


def test_observations_in_one_buffer_are_what_the_model_sees():
    """With `copy=False` every step writes into the images of the step before, of which the model sees two."""
    model, asked = model_of(d_model=32, d_head=16, d_mlp=32, n_timesteps=2), np.full(12, 0.9)
    tables = [rollout_in(minigrid_envs(4, 20, copy=copy), model, asked, seed=2) for copy in (True, False)]
    pd.testing.assert_frame_equal(*tables)


def test_lockstep_and_minigrid_itself_agree():
    """The same model in minigrid's own environments: the same mean return and length within 4 standard errors."""
    model = model_of(d_model=32, d_head=16, d_mlp=32)
    model.b_U.data[2] = 0.5
    asked = np.full(400, 0.9)
    task = Task.from_env_id("MiniGrid-Dynamic-Obstacles-5x5-v0", max_steps=30)
    ours = episode_table(rollout(model, asked, seed=2, task=task), asked)
    theirs = rollout_in(minigrid_envs(16, 30, size=5), model, asked, seed=2)
    also = rollout_in(
        DynamicObstaclesVectorEnv(64, size=5, n_obstacles=2, max_steps=30), model, asked, seed=2
    )
    for other in (theirs, also):
        for column in ("return", "length"):
            spread = np.hypot(ours[column].sem(), other[column].sem())
            assert abs(ours[column].mean() - other[column].mean()) < 4 * spread, column


@pytest.mark.post_weights
def test_the_posts_model_behaves_as_measured_with_the_original():
    """Greedy returns of the post's own weights, as the original code gives them (−1, −0.870, 0.039, 0.927, 0.943)."""
    model = DecisionTransformer.from_post_checkpoint()
    curve = calibration_curve(model, [-1, -0.5, 0, 0.5, 0.9], episodes=400, greedy=True).set_index("rtg")
    for rtg, expected in {-1: -1.0, -0.5: -0.870, 0: 0.039, 0.5: 0.927, 0.9: 0.943}.items():
        assert abs(curve["mean"][rtg] - expected) < 4 * curve["sem"][rtg] + 0.02
    assert curve.loc[0, ["succeeded", "survived", "died"]].tolist() == pytest.approx(
        [0.61, 0.29, 0.10], abs=0.08
    )


@pytest.mark.parametrize("rtgs", [[float("nan")], [], ["high"], [[0.5]], [float("inf")]])
def test_an_rtg_that_is_no_number_is_refused(rtgs):
    with pytest.raises(ValueError, match="rtgs must be"):
        rollout(model_of(), rtgs, task=TASK)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="max_steps is 31; it must be at most the model's, 30"):
        rollout(model_of(), [0.5], task=Task(max_steps=31))
    with pytest.raises(ValueError, match="episodes is -1; it must be an integer ≥ 1"):
        calibration_curve(model_of(), [0.5], episodes=-1)
    elsewhere = DynamicObstaclesVectorEnv(2, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    with pytest.raises(ValueError, match="SAME_STEP"):
        rollout_in(elsewhere, model_of(), [0.5])
    for shape, sentence in (
        ({"n_actions": 4}, "the model's n_actions is 4; it must be at most the task's, 3."),
        ({"view_size": 5}, "the model's view_size is 5; it must be the task's, 7."),
    ):
        with pytest.raises(ValueError, match=sentence):
            rollout(model_of(**shape), [0.5], task=TASK)


def test_an_rtg_too_large_for_the_model_s_numbers_is_refused():
    with pytest.raises(ValueError, match=r"rtgs must be finite numbers, not \[1e\+39\]"):
        rollout(model_of(), [1e39], task=TASK)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_does_not_play(number):
    model = model_of(d_model=32, d_head=16, d_mlp=32)
    model.blocks[0].mlp.W_in.data[3, 4] = number
    own = DynamicObstaclesVectorEnv(2, 5, 2, 30)
    for play in (
        lambda: rollout(model, [0.5], greedy=True, task=TASK),
        lambda: calibration_curve(model, [0.0], 3, greedy=True, task=TASK),
        lambda: rollout_in(own, model, [0.5], greedy=True),
        lambda: ModelPolicy(model, np.zeros(1), True, np.random.default_rng(0)),
    ):
        with pytest.raises(
            ValueError, match=r"model has numbers in blocks\.0\.mlp\.W_in that are not finite"
        ):
            play()


def test_a_logit_that_is_no_number_is_refused_and_one_that_forbids_is_obeyed():
    """A hook, as people attach it with plain PyTorch, decides what is played."""
    for greedy in (True, False):
        model = model_of(d_model=32, d_head=16, d_mlp=32)
        only_left = torch.tensor([0.0, float("-inf"), float("-inf")])
        hook = model.register_forward_hook(lambda _, __, logits, only=only_left: logits + only)
        played = rollout(model, np.zeros(20), greedy, seed=3, task=TASK)
        assert not played.actions.any()
        assert played.truncated.all()
        hook.remove()
        assert rollout(model, np.zeros(20), greedy, seed=3, task=TASK).actions.any()
        model.blocks[0].register_forward_hook(lambda _, __, resid: resid * float("nan"))
        with pytest.raises(ValueError, match="a logit of model is nan"):
            rollout(model, np.zeros(20), greedy, seed=3, task=TASK)
