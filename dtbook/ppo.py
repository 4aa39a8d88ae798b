"""The online agent: clipped PPO with generalised advantage estimation, in one file read top to bottom.

The agent learns the task from pixels of the smallest kind (a 7×7 image of object codes) and, while it
learns, leaves what the Decision Transformer is trained on: checkpoints of every quality, from an agent that
walks into walls to one that always reaches the goal.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347); Schulman et al.
2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv:1506.02438); the
layout and the details (orthogonal initialisation, Adam's eps, advantages normalised per minibatch) follow
CleanRL's `ppo.py` (Huang et al. 2022, JMLR 23(274)).
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

# minigrid's codes of what Dynamic Obstacles can show: empty, wall, ball (an obstacle), goal. Nothing is ever
# unseen (the task looks through walls), and colour and state follow from the object.
OBJECTS = (1, 2, 6, 8)
ENCODINGS = {"one-hot": len(OBJECTS), "index": 3}  # inputs per cell of the view
TRUNCATIONS = ("terminate", "bootstrap", "ignore")


# ------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class PPOConfig:
    """Every choice of a run but the seed and the environments (whose number is theirs to say).

    The defaults solve 8×8 Dynamic Obstacles with 64 environments; raises ValueError naming the field.
    """

    total_steps: int = 1_000_000
    """Environment steps in all, over all environments; rounded down to whole updates."""
    num_steps: int = 64
    """Steps of each environment between two updates; the batch is num_steps × num_envs."""
    epochs: int = 4
    """Passes over the batch in each update."""
    minibatches: int = 8
    """Parts, of equal size, that the batch is shuffled into in each pass."""
    learning_rate: float = 1e-3
    """Adam's step size, constant."""
    gamma: float = 0.99
    """Discount per step, in [0, 1]."""
    gae_lambda: float = 0.95
    """Decay per step of GAE's mixture, in [0, 1]: 0 trusts the critic, 1 the sampled returns."""
    clip: float = 0.4
    """How far the probability ratio may move from 1 before it earns no more."""
    entropy_coef: float = 0.25
    """Weight of the policy's entropy (nats), constant. Small or annealed: the agent spins and survives."""
    value_coef: float = 0.5
    """Weight of the critic's loss, which is half the squared error."""
    max_grad_norm: float = 2.0
    """Longest gradient (Euclidean, all parameters together) that Adam is given."""
    hidden: int = 64
    """Units in each of the two tanh layers of the actor, and of the critic."""
    encoding: str = "one-hot"
    """What the agent sees: "one-hot" objects, or "index", the raw codes of all three channels (the post)."""
    truncation: str = "terminate"
    """What follows the step limit: "terminate" nothing, as if the episode had ended; "bootstrap" the critic's
    value of the final observation; "ignore" the next episode, as in the original (a time limit goes
    unnoticed, so value leaks in from the episode after it)."""
    checkpoint_every: int = 2
    """Updates between two checkpoints."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("total_steps", "num_steps", "epochs", "minibatches", "hidden", "checkpoint_every"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= 1, name, value, "a whole number of at least 1")
        for name in ("learning_rate", "clip", "max_grad_norm"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a positive number")
        for name in ("entropy_coef", "value_coef"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "zero or a positive number")
        for name in ("gamma", "gae_lambda"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(self.encoding in ENCODINGS, "encoding", self.encoding, f"one of {', '.join(ENCODINGS)}")
        _require(
            self.truncation in TRUNCATIONS, "truncation", self.truncation, f"one of {', '.join(TRUNCATIONS)}"
        )

    @classmethod
    def post(cls) -> "PPOConfig":
        """Return the settings behind the post, to be used with 30 environments.

        Source: `scripts/run_ppo.sh` and `src/ppo/` of github.com/jbloomAus/DecisionTransformerInterpretability.
        """
        return cls(
            total_steps=200_000,
            learning_rate=2.5e-4,
            minibatches=30,
            encoding="index",
            truncation="ignore",
        )


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


# -------------------------------------------------------------------------------------------------- agent


class ActorCritic(nn.Module):
    """Two separate networks over the same input: logits over actions, and the value of the observation.

    Each is inputs → hidden → hidden → outputs with tanh. Inputs are channel-major as everywhere in the book:
    slot·49 + i·7 + j for `images[:, i, j]`, a slot being an object ("one-hot") or a channel ("index").
    """

    def __init__(
        self,
        n_actions: int = 3,
        view_size: int = 7,
        hidden: int = 64,
        encoding: str = "one-hot",
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw orthogonal weights from the generator (a fixed one if none is given); biases are zero."""
        super().__init__()
        _require(encoding in ENCODINGS, "encoding", encoding, f"one of {', '.join(ENCODINGS)}")
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.encoding = encoding
        self.n_inputs = ENCODINGS[encoding] * view_size**2
        # A last layer near zero makes the first policy uniform, whatever it sees.
        self.actor = _mlp(self.n_inputs, hidden, n_actions, 0.01, generator)
        self.critic = _mlp(self.n_inputs, hidden, 1, 1.0, generator)
        slots = torch.full((256,), len(OBJECTS))
        slots[list(OBJECTS)] = torch.arange(len(OBJECTS))
        self.register_buffer("slots", slots, persistent=False)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "ActorCritic":
        """Return the agent that a checkpoint holds; the shapes of its tensors say which sizes it had."""
        hidden, n_inputs = state_dict["actor.0.weight"].shape
        view_sizes = {encoding: math.isqrt(n_inputs // depth) for encoding, depth in ENCODINGS.items()}
        encoding = next(e for e, view in view_sizes.items() if ENCODINGS[e] * view**2 == n_inputs)
        agent = cls(len(state_dict["actor.4.bias"]), view_sizes[encoding], hidden, encoding)
        agent.load_state_dict(state_dict)
        return agent

    def encode(self, images: UInt8[Tensor, "batch view view 3"]) -> Float32[Tensor, "batch inputs"]:
        """Return what both networks read; raises ValueError for an object that the task does not have."""
        if self.encoding == "index":
            return images.movedim(-1, 1).flatten(1).float()
        slots = self.slots[images[..., 0].flatten(1).int()]  # (batch, cells)
        if (slots == len(OBJECTS)).any():
            seen = images[..., 0].unique().tolist()
            raise ValueError(f"images must show only the objects {OBJECTS} in channel 0, got {seen}.")
        n_cells = slots.shape[1]
        positions = slots * n_cells + torch.arange(n_cells)
        return torch.zeros(len(images), self.n_inputs).scatter_(1, positions, 1.0)

    def heads(
        self, inputs: Float32[Tensor, "batch inputs"]
    ) -> tuple[Float32[Tensor, "batch actions"], Float32[Tensor, " batch"]]:
        """Return the action logits and the values of observations that are already encoded."""
        return self.actor(inputs), self.critic(inputs).squeeze(1)

    def forward(
        self, images: UInt8[Tensor, "batch view view 3"]
    ) -> tuple[Float32[Tensor, "batch actions"], Float32[Tensor, " batch"]]:
        """Return the action logits and the values (expected discounted returns) of observations."""
        return self.heads(self.encode(images))

    @torch.inference_mode()
    def act(
        self,
        images: UInt8[Tensor, "batch view view 3"],
        generator: torch.Generator,
        greedy: bool = False,
        temperature: float = 1.0,
        epsilon: float = 0.0,
    ) -> Int64[Tensor, " batch"]:
        """Return one action per observation.

        Sampled from softmax(logits / temperature), or the likeliest one if greedy; then, with probability
        epsilon each, replaced by an action drawn uniformly. Raises ValueError for a temperature that is not
        positive and an epsilon outside [0, 1].
        """
        _require(temperature > 0, "temperature", temperature, "positive")
        _require(0 <= epsilon <= 1, "epsilon", epsilon, "between 0 and 1")
        logits = self.actor(self.encode(images))
        if greedy:
            actions = logits.argmax(1)
        else:
            actions = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)
        if epsilon == 0:
            return actions
        explore = torch.rand(len(actions), generator=generator) < epsilon
        return torch.where(
            explore, torch.randint(logits.shape[1], actions.shape, generator=generator), actions
        )


def _mlp(n_in: int, hidden: int, n_out: int, last_gain: float, generator: torch.Generator) -> nn.Sequential:
    layers = [nn.Linear(n_in, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, n_out)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


# ---------------------------------------------------------------------------------------------- collecting


class Rollout(NamedTuple):
    """What num_steps steps of every environment gave."""

    images: UInt8[Tensor, "steps+1 envs view view 3"]
    """What the agent saw before each step, and after the last."""
    actions: Int64[Tensor, "steps envs"]
    rewards: Float32[Tensor, "steps envs"]
    terminated: Bool[Tensor, "steps envs"]
    cut: Bool[Tensor, "steps envs"]
    """Truncated, and not terminated by the same step."""
    final_images: UInt8[Tensor, "cuts view view 3"]
    """The last observation of each episode that was cut, in the order of `cut`'s true entries."""


class Episodes:
    """Sums the reward and counts the steps of each environment's current episode."""

    def __init__(self, num_envs: int) -> None:
        """Start an episode in every environment."""
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, dtype=np.int64)

    def add(self, rewards: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take in one step; return the environments whose episode it ended, with its return and length."""
        self.returns += rewards
        self.lengths += 1
        which = np.flatnonzero(ended)
        finished = which, self.returns[which], self.lengths[which]
        self.returns[which], self.lengths[which] = 0.0, 0
        return finished


def collect(
    envs: VectorEnv, agent: ActorCritic, images: np.ndarray, num_steps: int, generator: torch.Generator
) -> Rollout:
    """Step every environment num_steps times from where it stands; `images` is what it shows there.

    Only the actor runs here: the critic's values and the log-probabilities of the whole batch come from one
    pass afterwards, with the same weights.
    """
    shape = (num_steps, envs.num_envs)
    seen = np.empty((num_steps + 1, *images.shape), dtype=np.uint8)
    actions, rewards = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.float32)
    terminated, truncated = np.empty(shape, dtype=bool), np.empty(shape, dtype=bool)
    final_images = [seen[0, :0]]  # so that concatenating works when no episode is cut
    seen[0] = images
    for t in range(num_steps):
        actions[t] = agent.act(torch.from_numpy(seen[t]), generator).numpy()
        seen[t + 1], rewards[t], terminated[t], truncated[t], infos = envs.step(actions[t])
        cut = truncated[t] & ~terminated[t]
        if cut.any():
            final_images.append(np.stack(list(infos["final_obs"][cut])))
    columns = (seen, actions, rewards, terminated, truncated & ~terminated, np.concatenate(final_images))
    return Rollout(*map(torch.from_numpy, columns))


# ------------------------------------------------------------------------------------------------ learning


def gae(
    rewards: Float32[Tensor, "steps envs"],
    values: Float32[Tensor, "steps envs"],
    next_values: Float32[Tensor, "steps envs"],
    ended: Bool[Tensor, "steps envs"],
    gamma: float,
    gae_lambda: float,
) -> Float32[Tensor, "steps envs"]:
    """Return the generalised advantage estimates (arXiv:1506.02438, equation 16).

    A_t = δ_t + γλ·A_{t+1}, where δ_t = r_t + γ·next_value_t − value_t, and A_{t+1} counts as zero where step
    t ended an episode and after the last step. `next_values` is the value of what follows each step: zero
    where nothing does.
    """
    deltas = rewards + gamma * next_values - values
    keep = gamma * gae_lambda * (~ended)
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + keep[t] * running
        advantages[t] = running
    return advantages


def what_follows(
    rollout: Rollout, values: Float32[Tensor, "steps+1 envs"], agent: ActorCritic, truncation: str
) -> tuple[Float32[Tensor, "steps envs"], Bool[Tensor, "steps envs"]]:
    """Return the value of what follows each step, and where an episode ends, as `truncation` sees it."""
    ended = rollout.terminated if truncation == "ignore" else rollout.terminated | rollout.cut
    next_values = values[1:] * ~ended
    if truncation == "bootstrap":
        next_values[rollout.cut] = agent(rollout.final_images)[1]
    return next_values, ended


class Batch(NamedTuple):
    """A rollout made ready to learn from, its steps and environments flattened into one axis."""

    inputs: Float32[Tensor, "batch inputs"]
    actions: Int64[Tensor, " batch"]
    log_probs: Float32[Tensor, " batch"]
    """Of the actions taken, in nats, under the policy that took them."""
    advantages: Float32[Tensor, " batch"]
    returns: Float32[Tensor, " batch"]
    """What the critic should have said: its value plus the advantage."""

    @property
    def explained_variance(self) -> float:
        """The share of the returns' variance that the critic foresaw; NaN where they do not vary."""
        variance = self.returns.var().item()
        return 1 - self.advantages.var().item() / variance if variance > 0 else math.nan


@torch.no_grad()
def prepare(rollout: Rollout, agent: ActorCritic, config: PPOConfig) -> Batch:
    """Return the batch that a rollout gives: values, log-probabilities and advantages, all computed once."""
    steps, envs = rollout.actions.shape
    inputs = agent.encode(rollout.images.flatten(0, 1))  # ((steps + 1) · envs, inputs)
    logits, values = agent.heads(inputs)
    values = values.view(steps + 1, envs)
    next_values, ended = what_follows(rollout, values, agent, config.truncation)
    advantages = gae(rollout.rewards, values[:-1], next_values, ended, config.gamma, config.gae_lambda)
    actions = rollout.actions.flatten()
    return Batch(
        inputs=inputs[:-envs],
        actions=actions,
        log_probs=_log_prob(logits[:-envs].log_softmax(1), actions),
        advantages=advantages.flatten(),
        returns=(advantages + values[:-1]).flatten(),
    )


def _log_prob(log_probs: Tensor, actions: Tensor) -> Tensor:
    return log_probs.gather(1, actions[:, None]).squeeze(1)


class Losses(NamedTuple):
    """The terms of PPO's loss on one minibatch, and how far the policy has moved; all are means."""

    policy: Float32[Tensor, ""]
    value: Float32[Tensor, ""]
    """Half the squared error of the critic."""
    entropy: Float32[Tensor, ""]
    """Of the policy, in nats."""
    approx_kl: Float32[Tensor, ""]
    """KL divergence of the new policy from the old, in nats: mean of (ratio − 1) − log ratio."""
    clip_fraction: Float32[Tensor, ""]
    """The share of steps whose probability ratio lies beyond the clip."""


def ppo_losses(
    logits: Float32[Tensor, "batch actions"], values: Float32[Tensor, " batch"], batch: Batch, clip: float
) -> Losses:
    """Return the terms of the clipped objective (arXiv:1707.06347, equations 7 and 9), to be minimised.

    Advantages are normalised to mean 0 and standard deviation 1 within the minibatch.
    """
    log_probs = logits.log_softmax(1)
    log_ratio = _log_prob(log_probs, batch.actions) - batch.log_probs
    ratio = log_ratio.exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip).float().mean()
    return Losses(
        policy=-torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean(),
        value=0.5 * F.mse_loss(values, batch.returns),
        entropy=-(log_probs.exp() * log_probs).sum(1).mean(),
        approx_kl=approx_kl,
        clip_fraction=clip_fraction,
    )


def learn(
    agent: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: PPOConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Take epochs × minibatches optimiser steps; return the means over them of the losses and the gradient."""
    rows = []
    for _ in range(config.epochs):
        order = torch.randperm(len(batch.actions), generator=generator)
        for indices in order.chunk(config.minibatches):
            part = Batch(*(column.index_select(0, indices) for column in batch))
            losses = ppo_losses(*agent.heads(part.inputs), part, config.clip)
            loss = losses.policy + config.value_coef * losses.value - config.entropy_coef * losses.entropy
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            rows.append(torch.stack([*losses, grad_norm]).detach())
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")
    return dict(zip(names, torch.stack(rows).mean(0).tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ the run


class PPOResult(NamedTuple):
    """What a run leaves."""

    agent: ActorCritic
    checkpoints: dict[int, dict[str, Tensor]]
    """State dictionaries by the number of environment steps taken before; `ActorCritic.from_state_dict`."""
    diagnostics: pd.DataFrame
    """One row an update: env_steps, episodes that ended, their mean_return and mean_length (steps; NaN
    without any), explained_variance, and the means over the update's minibatches of policy_loss, value_loss,
    entropy (nats), approx_kl (nats), clip_fraction and grad_norm (before clipping)."""


def train(
    envs: VectorEnv, config: PPOConfig | None = None, seed: int = 0, progress: bool = True
) -> PPOResult:
    """Train an agent from nothing; the same seed on the same machine gives the same bytes.

    The environments must reset in the step that ends an episode (SAME_STEP). One million steps with the
    defaults and 64 environments make 244 updates, so 122 checkpoints; the untrained network is not among them,
    the last one is the finished agent's. Raises ValueError for environments that the agent cannot read and
    for a batch that does not divide into the minibatches.
    """
    config = config if config is not None else PPOConfig()
    n_updates = _check(envs, config)
    env_seed, torch_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    generator = torch.Generator().manual_seed(torch_seed)
    agent = _agent_for(envs, config, generator)
    optimizer = torch.optim.Adam(agent.parameters(), config.learning_rate, eps=1e-5, fused=True)
    episodes, recent = Episodes(envs.num_envs), deque[float](maxlen=200)
    images, _ = envs.reset(seed=env_seed)
    checkpoints, rows = {}, []
    with one_thread(), tqdm(total=n_updates, desc="PPO", unit="update", disable=not progress) as bar:
        for update in range(1, n_updates + 1):
            rollout = collect(envs, agent, images, config.num_steps, generator)
            images = rollout.images[-1].numpy()
            batch = prepare(rollout, agent, config)
            row = {"env_steps": update * rollout.actions.numel()} | _episode_row(rollout, episodes, recent)
            row["explained_variance"] = batch.explained_variance
            rows.append(row | learn(agent, optimizer, batch, config, generator))
            if update % config.checkpoint_every == 0:
                checkpoints[row["env_steps"]] = {k: v.clone() for k, v in agent.state_dict().items()}
            bar.set_postfix(mean_return=f"{np.mean(recent or [math.nan]):.3f}", refresh=False)
            bar.update()
    return PPOResult(agent, checkpoints, pd.DataFrame(rows))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: networks this small gain nothing from two, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(envs: VectorEnv, config: PPOConfig) -> int:
    """Return the number of updates, once environments and configuration are known to fit."""
    _check_envs(envs)
    batch = config.num_steps * envs.num_envs
    fits = batch % config.minibatches == 0 and batch >= 2 * config.minibatches
    divisor = f"a divisor of the batch of {batch} steps, with two steps or more in each part"
    _require(fits, "minibatches", config.minibatches, divisor)
    _require(config.total_steps >= batch, "total_steps", config.total_steps, f"at least a batch, {batch}")
    return config.total_steps // batch


def _check_envs(envs: VectorEnv) -> None:
    mode = envs.metadata.get("autoreset_mode")
    _require(mode == AutoresetMode.SAME_STEP, "envs' autoreset_mode", mode, "SAME_STEP")
    space = envs.single_observation_space
    image = (
        space.dtype == np.uint8 and len(space.shape or ()) == 3 and space.shape == (*space.shape[:1] * 2, 3)
    )
    _require(image, "envs' single_observation_space", space, "square uint8 images of three channels")
    actions = envs.single_action_space
    _require(isinstance(actions, Discrete), "envs' single_action_space", actions, "Discrete")


def _agent_for(envs: VectorEnv, config: PPOConfig, generator: torch.Generator) -> ActorCritic:
    n_actions, view_size = int(envs.single_action_space.n), envs.single_observation_space.shape[0]
    return ActorCritic(n_actions, view_size, config.hidden, config.encoding, generator)


def _episode_row(rollout: Rollout, episodes: Episodes, recent: deque[float]) -> dict[str, float]:
    """Return the diagnostics of the episodes that ended in a rollout; their returns join the recent ones."""
    ended = (rollout.terminated | rollout.cut).numpy()
    finished = [episodes.add(r, e) for r, e in zip(rollout.rewards.numpy(), ended, strict=True)]
    _, returns, lengths = (np.concatenate(column) for column in zip(*finished, strict=True))
    recent.extend(returns.tolist())
    means = [column.mean() if len(column) else math.nan for column in (returns, lengths)]
    return {"episodes": len(returns), "mean_return": means[0], "mean_length": means[1]}


def evaluate(agent: ActorCritic, envs: VectorEnv, episodes: int, greedy: bool, seed: int) -> pd.DataFrame:
    """Play whole episodes; return their `return` (undiscounted) and `length` (steps), one row each.

    Each environment plays its share of the episodes and no more: taking whichever end first would favour the
    short ones. Rows stand in the order in which episodes ended. Raises ValueError for fewer than one episode.
    """
    _require(episodes >= 1, "episodes", episodes, "at least 1")
    _check_envs(envs)
    env_seed, torch_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    generator = torch.Generator().manual_seed(torch_seed)
    left = np.full(envs.num_envs, episodes // envs.num_envs)
    left[: episodes % envs.num_envs] += 1
    tally, rows = Episodes(envs.num_envs), []
    images, _ = envs.reset(seed=env_seed)
    while left.any():
        actions = agent.act(torch.from_numpy(images), generator, greedy).numpy()
        images, rewards, terminated, truncated, _ = envs.step(actions)
        which, returns, lengths = tally.add(rewards, terminated | truncated)
        wanted = left[which] > 0
        rows.append(pd.DataFrame({"return": returns[wanted], "length": lengths[wanted]}))
        left[which[wanted]] -= 1
    return pd.concat(rows, ignore_index=True)
