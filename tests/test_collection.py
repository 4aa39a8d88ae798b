"""Collecting by quota: the crew plays as its members would, and every class gets its steps."""

import numpy as np
import pytest
import torch

from dtbook.gridworld import Task
from dtbook.trajectories import play
from dtbook.trajectories.agent import ActorCritic
from dtbook.trajectories.collection import Crew, QuotaConfig, collect_by_quota, steps_by_class

TASK = Task(size=5, n_obstacles=2, max_steps=40)


def agent(seed, bias=(0.0, 0.0, 0.0), encoding="one-hot", opinion=100.0):
    """A random network with strong opinions, its actions pushed by a bias."""
    made = ActorCritic(encoding=encoding, generator=torch.Generator().manual_seed(seed))
    made.actor[4].weight.data *= opinion
    made.actor[4].bias.data += torch.tensor(bias)
    return made.state_dict()


CHECKPOINTS = {1000: agent(0), 2000: agent(1, (9.0, 0.0, 0.0)), 3000: agent(2, opinion=1.0)}


@pytest.mark.parametrize("encoding", ["one-hot", "index"])
def test_batched_logits_are_each_members_own(encoding):
    checkpoints = {k: agent(k, encoding=encoding) for k in (1, 2, 3, 4)}
    crew = Crew(checkpoints, (1.0,))
    rng = np.random.default_rng(0)
    played = play(TASK, lambda images, e, t: rng.integers(3, size=len(images)), 20, rng)
    images = played.observations(np.arange(30))
    member = np.sort(np.array([0, 1, 3])[rng.integers(3, size=30)])  # uneven, one absent
    together = crew._logits(images, member)
    for row in range(30):
        alone = ActorCritic.from_state_dict(checkpoints[member[row] + 1])
        with torch.no_grad():
            expected, _ = alone(torch.from_numpy(images[[row]]))
        np.testing.assert_allclose(together[row], expected[0], atol=1e-4)


def test_temperature_and_epsilon():
    """Shares of actions against softmax(logits / T) and its mixture with the uniform distribution."""
    n, task = 20_000, Task(size=5, n_obstacles=0, max_steps=1)
    crew = Crew({1: agent(5, opinion=50.0)}, (1.0, 0.25, -0.3))
    for mode, (temperature, epsilon) in enumerate([(1.0, 0.0), (0.25, 0.0), (1.0, 0.3)]):
        played = crew.play(task, np.full(n, mode), np.random.default_rng(1))
        logits = crew._logits(played.observations(np.zeros(1, int)), np.zeros(1, int))[0] / temperature
        softmax = np.exp(logits - logits.max())
        p = (1 - epsilon) * softmax / softmax.sum() + epsilon / 3
        assert p.max() < 0.999, "a test of sampling needs a distribution with some spread"
        share = np.bincount(played.actions, minlength=3) / n
        assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)).all(), mode


@pytest.mark.slow
def test_every_class_reaches_its_quota_and_no_more():
    config = QuotaConfig(steps_per_class=3_000, round_episodes=500, max_rounds=200)
    collected = collect_by_quota(CHECKPOINTS, TASK, config, seed=0, progress=False)
    steps = steps_by_class(collected.trajectories)
    assert (steps >= 3_000).all()
    assert (steps < 3_000 + TASK.max_steps).all()
    assert set(collected.trajectories.checkpoint) <= set(CHECKPOINTS)
    assert set(collected.log["class"]) == {"−1", "0", "+"}


def test_a_class_that_nobody_produces_stays_empty_and_is_told():
    config = QuotaConfig(
        steps_per_class=500, round_episodes=50, max_rounds=3, temperatures=(1e-3,), epsilon=0.0
    )
    collected = collect_by_quota({7: agent(2, (99.0, 0, 0))}, TASK, config, seed=0, progress=False)
    assert steps_by_class(collected.trajectories).tolist()[0] == 0
    assert collected.log.set_index("class").loc["+", "steps"] == 0


def test_collecting_is_deterministic(tmp_path):
    config = QuotaConfig(steps_per_class=500, round_episodes=50)
    for name in "ab":
        collect_by_quota(CHECKPOINTS, TASK, config, 4, progress=False).trajectories.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps_per_class", 0),
        ("max_rounds", -1),
        ("temperatures", (1.0, 0.0)),
        ("epsilon", 1.0),
        ("probe_episodes", 0),
    ],
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        QuotaConfig(**{field: value})
    with pytest.raises(ValueError, match="at least one checkpoint"):
        Crew({}, (1.0,))
