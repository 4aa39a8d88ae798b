"""PPO against closed forms: probe tasks with known values and policies, GAE and the loss from definitions."""

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probe_envs import (
    END,
    TabularVectorEnv,
    constant_reward,
    cut_short,
    delayed_choice,
    delayed_reward,
    images_of,
    reward_by_action,
    reward_by_matching,
    reward_by_observation,
)

from dtbook.gridworld import DynamicObstaclesVectorEnv
from dtbook.trajectories.agent import OBJECTS, ActorCritic
from dtbook.trajectories.collection import Crew
from dtbook.trajectories.ppo import (
    PPOConfig,
    PreparedBatch,
    collect,
    evaluate_agent,
    gae,
    one_thread,
    ppo_losses,
    train_ppo,
)

N = 32  # environments of a probe
CRITIC = PPOConfig(15 * 10 * N, num_steps=10, learning_rate=1e-2, gamma=0.8, hidden=16)
ACTOR = replace(CRITIC, learning_rate=3e-3, entropy_coef=0.2, clip=0.2)
LONGER = replace(CRITIC, total_steps=2 * CRITIC.total_steps)  # where values travel through values


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def learnt_values(envs, states, config=CRITIC):
    agent = train_ppo(envs, config, progress=False).agent
    with torch.no_grad():
        return agent(torch.from_numpy(images_of(states)))[1].numpy()


def learnt_policy(envs, states, config=ACTOR):
    agent = train_ppo(envs, config, progress=False).agent
    with torch.no_grad():
        return agent(torch.from_numpy(images_of(states)))[0].softmax(1).numpy()


# ------------------------------------------------------------------------- probes: the critic on its own


def test_critic_learns_a_constant():
    assert learnt_values(constant_reward(N), [0]) == pytest.approx([1.0], abs=0.02)


def test_critic_tells_observations_apart():
    rewards = [-1.0, 0.0, 0.5, 2.0]
    values = learnt_values(reward_by_observation(N, rewards), range(4))
    assert values == pytest.approx(rewards, abs=0.05)


@pytest.mark.parametrize("gamma", [0.8, 0.5])
def test_critic_discounts_a_delayed_reward(gamma):
    delay = 3
    values = learnt_values(delayed_reward(N, delay), range(delay + 1), replace(CRITIC, gamma=gamma))
    assert values == pytest.approx([gamma ** (delay - state) for state in range(delay + 1)], abs=0.03)


@pytest.mark.parametrize("truncation", ["terminate", "bootstrap", "ignore"])
def test_what_truncation_means(truncation):
    """State 0 pays 0, state 1 pays 1 for ever, and the episode is cut after one step in each."""
    gamma = CRITIC.gamma
    expected = {
        "terminate": [gamma, 1.0],  # nothing follows the two steps
        "bootstrap": [gamma / (1 - gamma), 1 / (1 - gamma)],  # the task's own values: the cut is only ours
        "ignore": [gamma / (1 - gamma**2), 1 / (1 - gamma**2)],  # 0, 1, 0, 1 … through every cut
    }[truncation]
    config = replace(LONGER, truncation=truncation)
    assert learnt_values(cut_short(N), [0, 1], config) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_the_critic_sees_a_finite_horizon_only_if_truncation_terminates():
    """One state that pays 1 for ever, cut every T steps: the mean of Σγ^k over what is left, or 1/(1−γ)."""
    horizon, gamma = 5, CRITIC.gamma
    envs = TabularVectorEnv(N, [[0]], [[1.0]], max_steps=horizon)
    left = np.arange(1, horizon + 1)
    finite = ((1 - gamma**left) / (1 - gamma)).mean()
    config = replace(LONGER, gae_lambda=1.0)  # λ = 1: targets are the sampled returns
    assert learnt_values(envs, [0], config) == pytest.approx([finite], rel=0.03)
    config = replace(config, truncation="bootstrap")
    assert learnt_values(envs, [0], config) == pytest.approx([1 / (1 - gamma)], rel=0.03)


# ------------------------------------------------------------------------- probes: the actor


def test_actor_finds_the_action_that_pays():
    policy = learnt_policy(reward_by_action(N, [0.0, 1.0, -1.0]), [0])
    assert policy[0, 1] > 0.9


def test_actor_matches_the_observation():
    policy = learnt_policy(reward_by_matching(N, 3), range(3))
    assert policy.diagonal().min() > 0.9


def test_actor_is_credited_for_a_choice_that_pays_later():
    policy = learnt_policy(delayed_choice(N, 4), [0])
    assert policy[0, 1] > 0.9


def test_entropy_bonus_keeps_the_policy_uniform():
    policy = learnt_policy(reward_by_action(N, [0.0, 1.0, -1.0]), [0], replace(ACTOR, entropy_coef=100.0))
    assert policy == pytest.approx(np.full((1, 3), 1 / 3), abs=0.02)


# ------------------------------------------------------------------------- GAE and the loss


def test_gae_is_the_sum_of_its_definition():
    """A_t = Σ_l (γλ)^l δ_{t+l}, summed up to the step that ends the episode, in float64."""
    steps, envs, gamma, lam = 12, 5, 0.97, 0.9
    draws = np.random.default_rng(0)
    rewards, values, next_values = draws.normal(size=(3, steps, envs)).astype(np.float32)
    ended = draws.random((steps, envs)) < 0.25
    expected = np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for later in range(t, steps):
                delta = float(rewards[later, n]) + gamma * float(next_values[later, n]) - values[later, n]
                expected[t, n] += (gamma * lam) ** (later - t) * delta
                if ended[later, n]:
                    break
    tensors = map(torch.from_numpy, (rewards, values, next_values, ended))
    np.testing.assert_allclose(gae(*tensors, gamma, lam), expected, atol=1e-5)


def test_gradient_of_the_losses_is_the_formula():
    """Written out: A·ratio·(1_a − π) where the clip leaves a slope, −π(log π + H), and v − R."""
    n, clip = 64, 0.2
    logits = torch.randn(n, 3, generator=rng(1)).requires_grad_()
    values = torch.randn(n, generator=rng(2)).requires_grad_()
    actions = torch.randint(3, (n,), generator=rng(3))
    old, advantages, returns = torch.randn(3, n, generator=rng(4))
    old = -old.abs() - 0.3
    batch = PreparedBatch(torch.zeros(n, 1), actions, old, advantages, returns)
    terms = ppo_losses(logits, values, batch, clip)

    z = logits.detach().double().numpy()
    policy = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    ratio = policy[np.arange(n), actions] / np.exp(old.double().numpy())
    a = (advantages.double().numpy() - advantages.mean().item()) / advantages.std().item()
    stuck = ((ratio > 1 + clip) & (a > 0)) | ((ratio < 1 - clip) & (a < 0))
    assert 5 < stuck.sum() < n - 5, "both branches must be tried"
    slope = np.where(stuck, 0.0, a * ratio)[:, None] * (np.eye(3)[actions] - policy)
    entropy = -(policy * np.log(policy)).sum(1, keepdims=True)

    gradient = {
        name: torch.autograd.grad(terms[name], logits, retain_graph=True)[0]
        for name in ("policy_loss", "entropy")
    }
    np.testing.assert_allclose(gradient["policy_loss"], -slope / n, atol=1e-6)
    np.testing.assert_allclose(gradient["entropy"], -policy * (np.log(policy) + entropy) / n, atol=1e-6)
    (of_values,) = torch.autograd.grad(terms["value_loss"], values)
    np.testing.assert_allclose(of_values, (values - returns).detach() / n, atol=1e-6)
    assert terms["entropy"].item() == pytest.approx(entropy.mean(), abs=1e-5)
    assert terms["clip_fraction"].item() == pytest.approx((np.abs(ratio - 1) > clip).mean(), abs=1e-6)
    assert terms["approx_kl"].item() == pytest.approx((ratio - 1 - np.log(ratio)).mean(), rel=1e-4)


# ------------------------------------------------------------------------- the agent


def some_images(batch=50, seed=0):
    draws = np.random.default_rng(seed)
    images = draws.integers(0, 6, (batch, 7, 7, 3), dtype=np.uint8)
    images[..., 0] = draws.choice(OBJECTS, (batch, 7, 7))
    return torch.from_numpy(images)


def test_encodings_are_channel_major():
    images = some_images()
    expected = np.zeros((50, 4 * 49))
    for n, i, j in np.ndindex(50, 7, 7):
        expected[n, OBJECTS.index(int(images[n, i, j, 0])) * 49 + i * 7 + j] = 1
    np.testing.assert_array_equal(ActorCritic().encode(images), expected)
    index = ActorCritic(encoding="index").encode(images)
    for n, i, j, channel in np.ndindex(50, 7, 7, 3):
        assert index[n, channel * 49 + i * 7 + j] == images[n, i, j, channel]


def test_objects_are_those_of_minigrid():
    from minigrid.core.constants import OBJECT_TO_IDX

    assert tuple(OBJECT_TO_IDX[name] for name in ("empty", "wall", "ball", "goal")) == OBJECTS


def test_an_unknown_object_is_refused():
    images = some_images()
    images[3, 2, 1, 0] = 4
    with pytest.raises(ValueError, match=r"is \[1, 2, 4, 6, 8\]; it must be of the objects \(1, 2, 6, 8\)"):
        ActorCritic()(images)


def test_initial_weights_are_orthogonal_and_the_first_policy_uniform():
    agent = ActorCritic(generator=rng())
    first = agent.actor[0].weight.double()  # 64 × 196: orthonormal rows times √2
    torch.testing.assert_close(first @ first.T, 2 * torch.eye(64).double(), atol=1e-5, rtol=0)
    with torch.no_grad():
        policy = agent(some_images())[0].softmax(1)
    assert policy.sub(1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("encoding", ["one-hot", "index"])
def test_a_checkpoint_becomes_the_agent_again(encoding):
    agent = ActorCritic(n_actions=5, hidden=12, encoding=encoding, generator=rng(7))
    again = ActorCritic.from_state_dict(agent.state_dict())
    assert again.encoding == encoding
    for one, other in zip(agent(some_images()), again(some_images()), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def opinionated(seed=0):
    agent = ActorCritic(generator=rng(seed))
    agent.actor[-1].weight.data *= 100
    return agent


@pytest.mark.parametrize(
    ("temperature", "epsilon"), [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.3)], ids=str
)
def test_actions_are_drawn_as_asked(temperature, epsilon):
    """Chi-squared of 20,000 actions against softmax(logits / temperature), mixed with the uniform."""
    agent, image = opinionated(), some_images(1)
    actions = agent.act(image.expand(20_000, 7, 7, 3), rng(1), temperature=temperature, epsilon=epsilon)
    logits = agent(image)[0][0].detach().double().numpy() / temperature
    policy = (1 - epsilon) * np.exp(logits) / np.exp(logits).sum() + epsilon / 3
    assert policy.max() - policy.min() > 0.1, "a flat policy would prove nothing"
    observed = np.bincount(actions, minlength=3)
    assert scipy.stats.chisquare(observed, policy * len(actions)).pvalue > 0.01


def test_greedy_takes_the_likeliest_and_epsilon_still_explores():
    agent, images = opinionated(), some_images(2000)
    best = agent(images)[0].argmax(1)
    assert torch.equal(agent.act(images, rng(), greedy=True), best)
    astray = (agent.act(images, rng(), greedy=True, epsilon=0.6) != best).float().mean()
    assert astray == pytest.approx(0.6 * 2 / 3, abs=0.04)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": 0.0}, "temperature is 0.0; it must be a finite number > 0"),
     ({"epsilon": 1.5}, "epsilon is 1.5; it must be a finite number from 0 to 1")],
)  # fmt: skip
def test_act_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic().act(some_images(), rng(), **wrong)


# ------------------------------------------------------------------------- runs


SHORT = PPOConfig(total_steps=3 * 16 * 32, num_steps=32, checkpoint_every=1)


def short_run(seed):
    return train_ppo(DynamicObstaclesVectorEnv(16, size=5, n_obstacles=2), SHORT, seed, progress=False)


def test_the_same_seed_gives_the_same_bytes():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (that nobody reads it is the point)
    before = torch.get_rng_state()
    one = short_run(seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    other, third = short_run(seed=3), short_run(seed=4)
    pd.testing.assert_frame_equal(one.diagnostics, other.diagnostics, check_exact=True)
    for step, state in one.checkpoints.items():
        assert all(torch.equal(tensor, other.checkpoints[step][name]) for name, tensor in state.items())
    assert not one.diagnostics.equals(third.diagnostics)


def test_checkpoints_are_snapshots_by_environment_steps():
    result = short_run(seed=0)
    assert list(result.checkpoints) == [512, 1024, 1536] == result.diagnostics["env_steps"].tolist()
    states = list(result.checkpoints.values())
    assert not torch.equal(states[0]["actor.0.weight"], states[1]["actor.0.weight"])
    final = result.agent.state_dict()
    assert all(torch.equal(tensor, final[name]) for name, tensor in states[-1].items())


def test_one_million_steps_leave_122_checkpoints():
    config = PPOConfig()
    updates = config.total_steps // (config.num_steps * 64)
    assert updates // config.checkpoint_every == 122


def test_diagnostics_of_a_task_that_ends_every_step():
    table = train_ppo(reward_by_observation(N, [0.0, 1.0]), CRITIC, progress=False).diagnostics
    assert (table["episodes"] == 10 * N).all()
    assert (table["mean_length"] == 1).all()
    assert table["mean_return"].mean() == pytest.approx(0.5, abs=0.02)
    assert table["explained_variance"].iloc[0] < 0.5 < 0.98 < table["explained_variance"].iloc[-1]
    assert (table["entropy"] == 0).all(), "one action leaves nothing to choose"


def test_entropy_and_kl_start_from_the_uniform_policy():
    table = short_run(seed=0).diagnostics
    assert table["entropy"][0] == pytest.approx(math.log(3), abs=0.02)
    assert 0 < table["approx_kl"][0] < 0.05
    assert not table.isna().any(axis=None)


def test_collect_keeps_what_a_cut_episode_would_have_shown_next():
    envs = cut_short(3)
    images, _ = envs.reset(seed=0)
    rollout = collect(envs, ActorCritic(n_actions=1), images, 5, rng())
    states = rollout.images[..., 0].flatten(2).eq(6).int().argmax(2)  # (steps + 1, envs): where the ball is
    assert states[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert rollout.cut[:, 0].tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(rollout.final_images, images_of([1] * 6))


def test_evaluation_does_not_favour_short_episodes():
    """Episodes of 1 and of 10 steps start equally often; the first to end would nearly all be short."""
    chain = [[state + 1] for state in range(9)] + [[END]]
    envs = TabularVectorEnv(16, chain, [[0.0]] * 9 + [[1.0]], starts=[0, 9])
    episodes = evaluate_agent(ActorCritic(n_actions=1), envs, 1003, greedy=True, seed=0)
    assert len(episodes) == 1003
    assert (episodes["return"] == 1).all()
    assert set(episodes["length"]) == {1, 10}
    assert (episodes["length"] == 1).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_it_learns_the_task_on_a_small_grid():
    config = PPOConfig(total_steps=65_536)
    envs = DynamicObstaclesVectorEnv(64, size=5, n_obstacles=2)
    result = train_ppo(envs, config, progress=False)
    first, last = result.diagnostics["mean_return"].iloc[[0, -1]]
    assert first < -0.8 < 0.5 < last
    untrained = evaluate_agent(ActorCritic(), envs, 200, greedy=True, seed=1)["return"].mean()
    assert untrained < 0.1
    assert evaluate_agent(result.agent, envs, 200, greedy=True, seed=1)["return"].mean() > 0.85
    in_minigrid = SyncVectorEnv([minigrid_5x5] * 20, autoreset_mode=AutoresetMode.SAME_STEP)
    assert evaluate_agent(result.agent, in_minigrid, 40, greedy=True, seed=1)["return"].mean() > 0.75


def minigrid_5x5():
    from minigrid.wrappers import ImgObsWrapper

    return ImgObsWrapper(gymnasium.make("MiniGrid-Dynamic-Obstacles-5x5-v0"))


def test_observations_in_one_buffer_are_learnt_from_as_they_were():
    """With `copy=False` every step writes into the images of the step before."""
    config = PPOConfig(total_steps=4 * 32, num_steps=16, minibatches=2)
    learnt, played = [], []
    for copy in (True, False):
        envs = SyncVectorEnv([minigrid_5x5] * 4, copy=copy, autoreset_mode=AutoresetMode.SAME_STEP)
        result = train_ppo(envs, config, progress=False)
        learnt.append(result.diagnostics)
        played.append(evaluate_agent(result.agent, envs, 9, greedy=False, seed=1))
    pd.testing.assert_frame_equal(*learnt)
    pd.testing.assert_frame_equal(*played)


def test_progress_shows_the_running_mean_return(capsys):
    train_ppo(constant_reward(N), replace(CRITIC, total_steps=10 * N), progress=True)
    assert "mean_return=1.000" in capsys.readouterr().err


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("total_steps", 0, "an integer ≥ 1"),
        ("epochs", -1, "an integer ≥ 1"),
        ("minibatches", True, "an integer ≥ 1"),
        ("learning_rate", 0.0, "a finite number > 0"),
        ("clip", math.inf, "a finite number > 0"),
        ("max_grad_norm", math.nan, "a finite number > 0"),
        ("entropy_coef", -0.1, "a finite number ≥ 0"),
        ("gamma", 1.01, "a finite number from 0 to 1"),
        ("gae_lambda", -0.5, "a finite number from 0 to 1"),
        ("encoding", "scaled", "one of 'index', 'one-hot'"),
        ("truncation", "stop", "one of 'bootstrap', 'ignore', 'terminate'"),
    ],
)
def test_config_refuses(as_users_run_it, name, value, allowed):
    with pytest.raises(ValueError, match=rf"^PPOConfig\.{name} is {value!r}; it must be {allowed}\.$"):
        PPOConfig(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"minibatches": 7}, "minibatches is 7; it must be a divisor of the batch of 320 steps, below it"),
        (
            {"minibatches": 320},
            "minibatches is 320; it must be a divisor of the batch of 320 steps, below it",
        ),
        ({"total_steps": 319}, "total_steps is 319; it must be at least a batch, 320"),
    ],
)
def test_train_refuses_a_batch_that_does_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        train_ppo(constant_reward(N), replace(CRITIC, **wrong))


def test_train_refuses_a_negative_seed():
    with pytest.raises(ValueError, match="seed is -1; it must be an integer ≥ 0"):
        train_ppo(constant_reward(N), CRITIC, seed=-1)


def changed(name, value):
    envs = constant_reward(N)
    setattr(envs, name, value)
    return envs


@pytest.mark.parametrize(
    ("envs", "message"),
    [
        (
            changed("metadata", {"autoreset_mode": AutoresetMode.NEXT_STEP}),
            "NEXT_STEP.*; it must be AutoresetMode.SAME_STEP",
        ),
        (
            changed("single_observation_space", Box(0, 1, (4,))),
            "it must be a Box of square uint8 images of minigrid's three indices",
        ),
        (
            changed("single_action_space", Box(0, 1, (1,))),
            "single_action_space is Box.*; it must be Discrete",
        ),
    ],
    ids=["autoreset", "observations", "actions"],
)
def test_train_and_evaluate_refuse_environments_they_cannot_read(envs, message):
    with pytest.raises(ValueError, match=message):
        train_ppo(envs, CRITIC)
    with pytest.raises(ValueError, match=message):
        evaluate_agent(ActorCritic(), envs, 5, greedy=True, seed=0)


def test_evaluate_refuses_no_episodes():
    with pytest.raises(ValueError, match="episodes is 0; it must be an integer ≥ 1"):
        evaluate_agent(ActorCritic(), constant_reward(N), 0, greedy=True, seed=0)


def test_training_that_diverges_stops_and_says_where():
    config = replace(CRITIC, learning_rate=1e38, max_grad_norm=1e38)
    with pytest.raises(ValueError, match=r"PPO has diverged at step \d+: its \S+ is no longer finite\."):
        train_ppo(reward_by_observation(N, [1e30, -1e30]), config, progress=False)


def test_an_agent_that_has_diverged_does_not_play():
    agent = ActorCritic(1)
    agent.actor[0].weight.data[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"agent has numbers in actor\.0\.weight that are not finite"):
        evaluate_agent(agent, constant_reward(N), 1, greedy=True, seed=0)
    with pytest.raises(ValueError, match=r"checkpoint 64 has numbers in actor\.0\.weight"):
        Crew({64: agent.state_dict()}, (1.0,))
