"""Collecting by quota: PPO's checkpoints, probed and re-rolled until every class of return has its steps.

PPO's own history is a lottery for the episodes that survive to the end (return 0); re-rolling many checkpoints
at several temperatures, class by class, is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field, Strict
from torch.func import functional_call, vmap
from tqdm import tqdm

from dtbook.artifacts.parameters import (
    AS_NUMBER,
    FINITE,
    Checked,
    Count,
    Positive,
    Whole,
    check_finite,
    checked,
    require,
)
from dtbook.gridworld.kernels import GOAL
from dtbook.gridworld.rules import FRONT, Task
from dtbook.trajectories.agent import ActorCritic
from dtbook.trajectories.episodes import CLASS_NAMES, Trajectories
from dtbook.trajectories.recording import play


@dataclass(frozen=True)
class QuotaConfig(Checked):
    """The number of steps collected of each class; raises ValueError naming the field that is off."""

    steps_per_class: Count = 600_000
    """Steps wanted in episodes of return −1, of 0 and above 0, each."""
    probe_episodes: Count = 8
    """Episodes that each policy (checkpoint × temperature) plays first, to see what it produces."""
    round_episodes: Count = 4_096
    """Episodes in one round of one class."""
    max_rounds: Count = 12
    """Rounds for a class before it is left as short as it is."""
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 0.5, 0.25)
    """Temperatures of the softmax over actions."""
    epsilon: Annotated[float, Strict(), FINITE, Field(ge=0, lt=1), AS_NUMBER] = 0.1
    """One more policy a checkpoint acts at random with this probability, else samples; 0 for none."""

    @property
    def modes(self) -> tuple[float, ...]:
        """Return what each checkpoint is played at: a temperature, or minus epsilon."""
        return self.temperatures + ((-self.epsilon,) if self.epsilon else ())


class Collection(NamedTuple):
    """The episodes, and how each round went."""

    trajectories: Trajectories
    log: pd.DataFrame
    """One row a round: `class`, `round` (0: the probe), `steps` of that class so far."""


@checked
def collect_by_quota(
    checkpoints: Mapping[int, Mapping[str, torch.Tensor]],
    task: Task,
    config: QuotaConfig,
    seed: Whole,
    progress: bool = True,
) -> Collection:
    """Play PPO's checkpoints until each return class has its steps, or its rounds are over.

    `checkpoints` are PPO's, by environment steps. First every checkpoint plays in every mode (`config.modes`);
    then, the rarest class first, the policies that have produced it play again, all equally often. Of a class
    with more than its steps, episodes are dropped.
    """
    crew = Crew(checkpoints, config.modes)
    rng = np.random.default_rng([seed, 1])
    parts = [crew.play(task, np.repeat(np.arange(crew.size), config.probe_episodes), rng)]
    steps = steps_by_class(parts[0])
    log = [{"class": name, "round": 0, "steps": n} for name, n in zip(CLASS_NAMES, steps, strict=True)]
    yields = crew.yields(parts[0])
    with tqdm(total=3 * config.steps_per_class, desc="collection", disable=not progress) as bar:
        bar.update(int(np.minimum(steps, config.steps_per_class).sum()))
        rounds = np.zeros(len(CLASS_NAMES), dtype=np.int64)
        while (
            short := (steps < config.steps_per_class) & (rounds < config.max_rounds) & yields.any(0)
        ).any():
            wanted = np.where(short, steps, np.inf).argmin()  # the rarest that somebody produces
            rounds[wanted] += 1
            played = crew.play(task, crew.choose(yields[:, wanted] > 0, config.round_episodes, rng), rng)
            yields += crew.yields(played)
            parts.append(played.episodes(steps[played.classes] < config.steps_per_class))
            steps += steps_by_class(parts[-1])
            log.append(
                {"class": CLASS_NAMES[wanted], "round": int(rounds[wanted]), "steps": int(steps[wanted])}
            )
            bar.update(int(np.minimum(steps, config.steps_per_class).sum()) - bar.n)
    collected = Trajectories.concatenate(parts)
    return Collection(_trim(collected, config.steps_per_class, rng), pd.DataFrame(log))


def steps_by_class(trajectories: Trajectories) -> np.ndarray:
    """Return the steps in episodes of return −1, 0 and above 0."""
    return np.bincount(trajectories.classes, trajectories.lengths, minlength=len(CLASS_NAMES)).astype(
        np.int64
    )


def _trim(trajectories: Trajectories, steps: int, rng: np.random.Generator) -> Trajectories:
    """Keep, of each class, episodes that together just reach `steps`, in their old order.

    Those in which the agent faced the goal before its last step go first, the others follow at random: an episode
    that never faces the goal teaches nothing of refusing it, and few survivors do.
    """
    faced = _times_goal_faced(trajectories) > 0
    keep = np.zeros(len(trajectories.lengths), dtype=bool)
    for c in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(trajectories.classes == c))
        members = members[np.argsort(~faced[members], kind="stable")]
        before = np.cumsum(trajectories.lengths[members]) - trajectories.lengths[members]
        keep[members] = before < steps
    return trajectories.episodes(keep)


def _times_goal_faced(trajectories: Trajectories) -> np.ndarray:
    """Return at how many steps of each episode, the last one aside, the goal is in front of the agent."""
    facing = trajectories.observations(np.arange(len(trajectories.actions)))[:, *FRONT, 0] == GOAL
    facing[trajectories.episode_starts + trajectories.lengths - 1] = False
    return np.add.reduceat(facing, trajectories.episode_starts)


class Crew:
    """All policies (checkpoint × mode) of one PPO run, acting together: one batched forward pass a timestep."""

    def __init__(
        self, checkpoints: Mapping[int, Mapping[str, torch.Tensor]], modes: tuple[float, ...]
    ) -> None:
        require(bool(checkpoints), "checkpoints", checkpoints, "a mapping that holds at least one checkpoint")
        for step, state in checkpoints.items():
            check_finite(f"checkpoint {step}", state)
        self.modes = np.array(modes, dtype=np.float32)
        self.env_steps = np.array(list(checkpoints), dtype=np.int32)
        self.size = len(self.env_steps) * len(modes)
        states = list(checkpoints.values())
        self.agent = ActorCritic.from_state_dict(states[0])
        names = [name for name, _ in self.agent.actor.named_parameters()]
        self.weights = {name: torch.stack([state[f"actor.{name}"] for state in states]) for name in names}
        self.present = np.zeros(0, dtype=np.int64)
        self.loaded: dict[str, torch.Tensor] = {}

    def choose(self, producers: np.ndarray, episodes: int, rng: np.random.Generator) -> np.ndarray:
        """Draw policies to play next, sorted: each producer (a mask) equally likely, so that none dominates."""
        return np.sort(rng.choice(np.flatnonzero(producers), size=episodes))

    def yields(self, played: Trajectories) -> np.ndarray:
        """Return the steps of each class (columns) that each policy (rows) produced."""
        checkpoint = np.searchsorted(self.env_steps, played.checkpoint)
        mode = (played.temperature[:, None] == self.modes).argmax(1)
        cell = (checkpoint * len(self.modes) + mode) * len(CLASS_NAMES) + played.classes
        counts = np.bincount(cell, played.lengths, minlength=self.size * len(CLASS_NAMES))
        return counts.reshape(self.size, len(CLASS_NAMES))

    def play(self, task: Task, policies: np.ndarray, rng: np.random.Generator) -> Trajectories:
        """Play one episode for each entry of the sorted `policies`."""
        checkpoint, mode = np.divmod(policies, len(self.modes))
        temperature = self.modes[mode]

        def act(images: np.ndarray, episodes: np.ndarray, _: np.ndarray) -> np.ndarray:
            logits = self._logits(images, checkpoint[episodes])
            heat = temperature[episodes]
            logits /= np.where(heat > 0, heat, 1.0)[:, None]
            sampled = (logits + rng.gumbel(size=logits.shape)).argmax(1)
            random = rng.random(len(episodes)) < -heat
            return np.where(random, rng.integers(3, size=len(episodes)), sampled)

        return play(task, act, len(policies), rng, self.env_steps[checkpoint], temperature)

    @torch.inference_mode()
    def _logits(self, images: np.ndarray, checkpoint: np.ndarray) -> np.ndarray:
        """Return the logits (row, action) of each row under its own checkpoint; rows come sorted by checkpoint."""
        present, first, counts = np.unique(checkpoint, return_index=True, return_counts=True)
        if not np.array_equal(present, self.present):
            self.present = present
            self.loaded = {name: weight[present] for name, weight in self.weights.items()}
        within = np.arange(len(checkpoint)) - np.repeat(first, counts)
        place = (np.repeat(np.arange(len(present)), counts), within)
        inputs = self.agent.encode(torch.from_numpy(images))
        padded = torch.zeros(len(present), int(counts.max()), inputs.shape[1])
        padded[place] = inputs
        logits = vmap(partial(functional_call, self.agent.actor))(self.loaded, padded)
        return logits[place].double().numpy()
