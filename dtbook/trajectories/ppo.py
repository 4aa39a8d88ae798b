"""Clipped PPO with generalised advantage estimation, in one file read top to bottom; the network is in `agent`.

The agent learns the task from nothing. On its way it leaves what the Decision Transformer is trained on:
checkpoints of every quality, from an agent that walks into walls, by way of one that survives for ever, to one
that always reaches the goal.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347); Schulman et al.
2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv:1506.02438). The
layout and the details (Adam's eps, advantages normalised within the minibatch) follow CleanRL (Huang et al.
2022, JMLR 23(274)).
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from dtbook.artifacts.parameters import (
    Checked,
    Count,
    NotNegative,
    Positive,
    Share,
    Whole,
    check_finite,
    checked,
    not_finite,
    require,
)
from dtbook.trajectories.agent import ActorCritic, Encoding, Inputs, Logits
from dtbook.trajectories.anytask import check_envs, check_rewards, first_images

PerStep = Float32[Tensor, "steps envs"]


# ------------------------------------------------------------------------------------------ configuration
@dataclass(frozen=True)
class PPOConfig(Checked):
    """Every choice of a run but its seed and its environments (how many, which task).

    The defaults solve 8×8 Dynamic Obstacles in 64 environments. Raises ValueError naming a field that is off.
    """

    total_steps: Count = 1_000_000
    """Environment steps in all, over all environments; rounded down to whole updates."""
    num_steps: Count = 64
    """Steps of each environment between two updates; a batch is num_steps × num_envs of them."""
    epochs: Count = 4
    """Passes over the batch in an update."""
    minibatches: Count = 4
    """Parts of equal size that a pass shuffles the batch into; one optimiser step each."""
    learning_rate: Positive = 1e-3
    """Adam's step size, constant."""
    gamma: Share = 0.99
    """Discount per step."""
    gae_lambda: Share = 0.95
    """Decay per step of GAE's mixture: 0 trusts the critic, 1 the sampled returns."""
    clip: Positive = 0.4
    """How far the ratio of new to old probability may leave 1 before going further earns nothing."""
    entropy_coef: NotNegative = 0.25
    """Weight of the policy's entropy (nats), constant. Small or annealed, the agent spins and survives."""
    value_coef: NotNegative = 0.5
    """Weight of the critic's loss, which is half its squared error."""
    max_grad_norm: Positive = 2.0
    """Longest gradient (Euclidean, over all parameters) that Adam is given; longer ones are scaled down."""
    hidden: Count = 64
    """Units in each of the two tanh layers."""
    encoding: Encoding = "one-hot"
    """What the agent sees: "one-hot" objects, or "index", the raw codes of all three channels (the post)."""
    truncation: Literal["terminate", "bootstrap", "ignore"] = "terminate"
    """What comes after the step limit. "terminate": nothing, as if the episode had ended there. "bootstrap":
    what the critic says of the final observation. "ignore": the next episode, as in the original, which
    overlooks truncation, so that value leaks in from an episode that has nothing to do with this one."""
    checkpoint_every: Count = 2
    """Updates from one checkpoint to the next."""

    @classmethod
    def post(cls) -> "PPOConfig":
        """Return the settings behind the post, meant for 30 environments.

        The original's actor and critic shared no layer. Source: `scripts/run_ppo.sh`, `src/ppo/`
        in github.com/jbloomAus/DecisionTransformerInterpretability.
        """
        return cls(200_000, minibatches=30, learning_rate=2.5e-4, encoding="index", truncation="ignore")


# ---------------------------------------------------------------------------------------------- collecting
class Rollout(NamedTuple):
    """The columns of num_steps steps of every environment."""

    images: UInt8[Tensor, "steps+1 envs view view 3"]
    """What the agent saw before each step, and after the last."""
    actions: Int64[Tensor, "steps envs"]
    rewards: PerStep
    terminated: Bool[Tensor, "steps envs"]
    cut: Bool[Tensor, "steps envs"]
    """Truncated, and not terminated by the same step."""
    final_images: UInt8[Tensor, "cuts view view 3"]
    """What the agent would have seen next in each episode that was cut, in the order of `cut`."""


def collect(
    envs: VectorEnv, agent: ActorCritic, images: np.ndarray, num_steps: int, generator: torch.Generator
) -> Rollout:
    """Step every environment num_steps times from where it stands, which is what `images` shows."""
    shape = (num_steps, envs.num_envs)
    seen = np.empty((num_steps + 1, *images.shape), dtype=np.uint8)
    actions, rewards = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32)
    terminated, cut = np.empty(shape, dtype=bool), np.empty(shape, dtype=bool)
    final_images = [seen[0, :0]]  # none, but of the right shape
    seen[0] = images
    for t in range(num_steps):
        actions[t] = agent.act(torch.from_numpy(seen[t]), generator)
        seen[t + 1], rewards[t], terminated[t], truncated, infos = envs.step(actions[t])
        cut[t] = truncated & ~terminated[t]
        if cut[t].any():
            final_images.append(np.stack(list(infos["final_obs"][cut[t]])))
    check_rewards(rewards)
    columns = (seen, actions, rewards, terminated, cut, np.concatenate(final_images))
    return Rollout(*map(torch.from_numpy, columns))


class Episodes:
    """The return (undiscounted) and the length (steps) of each environment's current episode so far."""

    def __init__(self, num_envs: int) -> None:
        """Begin an episode in each."""
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)

    def add(self, rewards: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take in one step; return the environments whose episode it ended, and its return and length."""
        self.returns += rewards
        self.lengths += 1
        which = np.flatnonzero(ended)
        finished = which, self.returns[which], self.lengths[which]
        self.returns[which], self.lengths[which] = 0.0, 0
        return finished


# ------------------------------------------------------------------------------------------------ learning
class PreparedBatch(NamedTuple):
    """A rollout as the agent learns from it: steps and environments flattened into one axis."""

    inputs: Inputs
    actions: Int64[Tensor, " batch"]
    log_probs: Float32[Tensor, " batch"]
    """Of the actions (nats), under the policy that took them."""
    advantages: Float32[Tensor, " batch"]
    returns: Float32[Tensor, " batch"]
    """What the critic is to say: what it said, plus the advantage."""


def gae(
    rewards: PerStep,
    values: PerStep,
    next_values: PerStep,
    ended: Bool[Tensor, "steps envs"],
    gamma: float,
    gae_lambda: float,
) -> PerStep:
    """Return the generalised advantage estimates (arXiv:1506.02438, equation 16).

    A_t = δ_t + γλ·A_{t+1} with δ_t = r_t + γ·next_value_t − value_t, where A_{t+1} is zero if step t ended an
    episode or is the last one. `next_values` is the value of what follows each step: zero where nothing does.
    """
    deltas = rewards + gamma * next_values - values
    decay = gamma * gae_lambda * ~ended
    advantages, running = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + decay[t] * running
        advantages[t] = running
    return advantages


@torch.no_grad()
def prepare(rollout: Rollout, agent: ActorCritic, config: PPOConfig) -> PreparedBatch:
    """Return the batch that a rollout gives; the agent must still be the one that acted in it."""
    steps, envs = rollout.actions.shape
    inputs = agent.encode(rollout.images.flatten(0, 1))
    logits, flat_values = agent.heads(inputs)
    values = flat_values.view(steps + 1, envs)
    ended = rollout.terminated if config.truncation == "ignore" else rollout.terminated | rollout.cut
    next_values = values[1:] * ~ended
    if config.truncation == "bootstrap":
        next_values[rollout.cut] = agent(rollout.final_images)[1]
    advantages = gae(rollout.rewards, values[:-1], next_values, ended, config.gamma, config.gae_lambda)
    actions, returns = rollout.actions.flatten(), (advantages + values[:-1]).flatten()
    log_probs = _of_actions(logits[:-envs].log_softmax(1), actions)
    return PreparedBatch(inputs[:-envs], actions, log_probs, advantages.flatten(), returns)


def _of_actions(log_probs: Logits, actions: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
    return log_probs.gather(1, actions[:, None]).squeeze(1)


def ppo_losses(
    logits: Logits, values: Float32[Tensor, " batch"], batch: PreparedBatch, clip: float
) -> dict[str, Float32[Tensor, ""]]:
    """Return the terms of the clipped objective (arXiv:1707.06347, equations 7 and 9) as means.

    `policy_loss` and `value_loss` (half the squared error) are to be minimised, `entropy` (nats) maximised.
    Advantages are normalised to mean 0 and deviation 1. `approx_kl` (nats; the mean of ratio − 1 − log ratio)
    and `clip_fraction` (the share of ratios beyond the clip) say how far the policy has moved.
    """
    log_probs = logits.log_softmax(1)
    log_ratio = _of_actions(log_probs, batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip).float().mean()
    return {
        "policy_loss": -objective.mean(),
        "value_loss": 0.5 * F.mse_loss(values, batch.returns),
        "entropy": -(log_probs.exp() * log_probs).sum(1).mean(),
        "approx_kl": approx_kl,
        "clip_fraction": clip_fraction,
    }


def learn(
    agent: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: PreparedBatch,
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Take epochs × minibatches optimiser steps; return each loss term and the gradient norm, averaged."""
    rows = []
    for _ in range(config.epochs):
        order = torch.randperm(len(batch.actions), generator=generator)
        for indices in order.chunk(config.minibatches):
            # index_select copies rows several times faster than batch[indices]
            part = PreparedBatch(*(column.index_select(0, indices) for column in batch))
            terms = ppo_losses(*agent.heads(part.inputs), part, config.clip)
            loss = terms["policy_loss"] + config.value_coef * terms["value_loss"]
            optimizer.zero_grad()
            (loss - config.entropy_coef * terms["entropy"]).backward()
            norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            rows.append(torch.stack([*terms.values(), norm]).detach())
    return dict(zip([*terms, "grad_norm"], torch.stack(rows).mean(0).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------- the run
class PPOResult(NamedTuple):
    """The result of a run."""

    agent: ActorCritic
    checkpoints: dict[int, dict[str, Tensor]]
    """State dictionaries, for `ActorCritic.from_state_dict`, by environment steps learnt from."""
    diagnostics: pd.DataFrame
    """One row an update: `env_steps` so far; `episodes` that ended, their `mean_return` (undiscounted) and
    `mean_length` (steps; NaN if none ended); `explained_variance`, the share of the variance of the returns
    that the critic foresaw (NaN if they do not vary); and what `learn` returns."""


@checked
def train_ppo(
    envs: VectorEnv, config: PPOConfig | None = None, seed: Whole = 0, progress: bool = True
) -> PPOResult:
    """Train an agent from nothing; the same seed on the same machine gives the same bytes.

    `envs` must reset in the step that ends an episode (SAME_STEP). With the defaults and 64 environments,
    244 updates leave 122 checkpoints; the untrained network is none of them. Raises ValueError, before any
    step, for environments that the agent cannot read and for a batch that does not split into minibatches.
    """
    config = PPOConfig() if config is None else config
    n_actions, view_size = check_envs(envs)
    n_updates = _count_updates(config, envs.num_envs)
    env_seed, generator = _seeds(seed)
    agent = ActorCritic(n_actions, view_size, config.hidden, config.encoding, generator)
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, eps=1e-5, fused=True)
    images = first_images(envs, env_seed)
    episodes, recent = Episodes(envs.num_envs), deque[float](maxlen=500)
    checkpoints, rows = {}, []
    with one_thread(), tqdm(total=n_updates, desc="PPO", unit="update", disable=not progress) as bar:
        for update in range(1, n_updates + 1):
            rollout = collect(envs, agent, images, config.num_steps, generator)
            images, env_steps = rollout.images[-1].numpy(), update * rollout.actions.numel()
            batch = prepare(rollout, agent, config)
            row = _episode_row(rollout, episodes, recent) | {"explained_variance": explained_variance(batch)}
            rows.append({"env_steps": env_steps} | row | learn(agent, optimizer, batch, config, generator))
            if wrong := not_finite(dict(agent.named_parameters())):
                raise ValueError(f"PPO has diverged at step {env_steps}: its {wrong} is no longer finite.")
            if update % config.checkpoint_every == 0:
                checkpoints[env_steps] = {name: t.clone() for name, t in agent.state_dict().items()}
            bar.set_postfix(mean_return=f"{np.mean(recent or [math.nan]):.3f}", refresh=False)
            bar.update()
    return PPOResult(agent, checkpoints, pd.DataFrame(rows))


def explained_variance(batch: PreparedBatch) -> float:
    """Return the share of the returns' variance that the critic foresaw; NaN if they do not vary."""
    variance = batch.returns.var().item()
    return 1 - batch.advantages.var().item() / variance if variance > 0 else math.nan


def _episode_row(rollout: Rollout, episodes: Episodes, recent: deque[float]) -> dict[str, float | int]:
    """Return the diagnostics of the episodes that ended in a rollout, and add their returns to `recent`."""
    ended = (rollout.terminated | rollout.cut).numpy()
    steps = [episodes.add(*step) for step in zip(rollout.rewards.numpy(), ended, strict=True)]
    _, returns, lengths = map(np.concatenate, zip(*steps, strict=True))
    recent.extend(returns.tolist())
    mean_return, mean_length = (
        column.mean().item() if len(column) else math.nan for column in (returns, lengths)
    )
    return {"episodes": len(returns), "mean_return": mean_return, "mean_length": mean_length}


@checked
def evaluate_agent(
    agent: ActorCritic, envs: VectorEnv, episodes: Count, greedy: bool, seed: Whole
) -> pd.DataFrame:
    """Play whole episodes; return the `return` (undiscounted) and `length` (steps) of each, one a row.

    Each environment plays its share of the episodes and no more: taking whichever end first would favour
    short ones. Raises ValueError for fewer than one episode.
    """
    check_envs(envs)
    check_finite("agent", agent.state_dict())
    env_seed, generator = _seeds(seed)
    images = first_images(envs, env_seed)
    share = np.arange(envs.num_envs) < episodes % envs.num_envs
    left = episodes // envs.num_envs + share
    tally, rows = Episodes(envs.num_envs), []
    while left.any():
        actions = agent.act(torch.from_numpy(images), generator, greedy).numpy()
        images, rewards, terminated, truncated, _ = envs.step(actions)
        check_rewards(rewards)
        finished = tally.add(rewards, terminated | truncated)
        rows += [row for row in zip(*finished, strict=True) if left[row[0]] > 0]
        left = np.maximum(left - (terminated | truncated), 0)
    return pd.DataFrame(rows, columns=["env", "return", "length"]).drop(columns="env")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: nets this small gain nothing from two, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seeds(seed: int) -> tuple[int, torch.Generator]:
    """Return independent sources for the environments and for the agent."""
    env_seed, torch_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    return env_seed, torch.Generator().manual_seed(torch_seed)


def _count_updates(config: PPOConfig, num_envs: int) -> int:
    batch = config.num_steps * num_envs
    splits = batch % config.minibatches == 0 and batch > config.minibatches  # one step has no deviation
    require(splits, "minibatches", config.minibatches, f"a divisor of the batch of {batch} steps, below it")
    require(config.total_steps >= batch, "total_steps", config.total_steps, f"at least a batch, {batch}")
    return config.total_steps // batch
